"""Implements `dsd create`: create a swarm and run its first peer."""

import msgspec

from node.config import CreateConfig, GatewayConfig
from node.config.running import check_swarm_drafter
from node.console import ConsoleProgress, console
from node.local.events import Ready, StageEvent
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState


def run(config: CreateConfig, gateway: GatewayConfig) -> int:
    """Create the swarm and serve until stopped. A swarm whose first peer cannot start is not left behind."""
    from dsd_p2p.models.architecture import read_shape
    from dsd_p2p.models.source import find_model
    from node.local.formats import with_format
    from node.member.model import absolute_model

    check_swarm_drafter(config.draft)
    state = SwarmState(config.swarm)
    state.refuse_second()
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        read_shape(source.folder)
        config = with_format(config, source)
        digest = source.digest()
    model = absolute_model(config.model)
    state.create(model=model, dtype=config.dtype, digest=digest, draft=config.draft)
    is_serving = False

    def tell(event: StageEvent) -> None:
        nonlocal is_serving
        is_serving = is_serving or isinstance(event, Ready)
        tell_user(event)

    console.print(f"swarm {config.swarm!r} created; to add other machines, run `dsd invite` here")
    console.print(
        f"recovery key, shown only now: {state.recovery_key()}\nwrite it down and keep it secret: whoever has it owns the "
        "swarm, and `dsd recover` needs it if this machine is lost"
    )
    try:
        return serve_swarm(msgspec.structs.replace(config, model=model, draft=""), tell, gateway)
    finally:
        if not is_serving:
            state.discard()
