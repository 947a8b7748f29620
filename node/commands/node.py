"""`dsd node`: one stage started by hand, or this machine's node of a swarm."""

import logging
import sys
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from dsd_p2p import units
from dsd_p2p.errors import DsdError, first_cause
from node.config import DEFAULT_SWARM, NodeConfig, ServeFlags, read_config, read_with_gateway
from node.console import ConsoleProgress
from node.control import Ask, Status, Stop, ask_node
from node.daemon import LoadStage, run_node
from node.events import Failed, NodeEvent
from node.stage_processes import watch_parent
from node.swarm_process import serve_swarm, tell_user
from node.swarm_state import SwarmState


def run(options: dict[str, object]) -> int:
    """Serve until stopped."""
    if options.pop("exit_with_parent", False):
        watch_parent()
    file = options.pop("config", None)
    action, drain = options.pop("action", "run"), str(options.pop("drain", "30s"))
    if action != "run":
        state = SwarmState(str(options.get("swarm", DEFAULT_SWARM)))
        drain_s = units.seconds(drain)
        ask: Ask = Stop(drain_s=drain_s) if action == "stop" else Status()
        print(msgspec.json.encode(trio.run(ask_node, state.control_socket, ask, drain_s + 10)).decode())
        return 0
    if "swarm" in options:
        config, door = read_with_gateway(ServeFlags, str(file) if file else None, options)
        return serve_swarm(config, tell_user, door)
    return serve(read_config(NodeConfig, str(file) if file else None, options), tell_user)


def serve(config: NodeConfig, report: Callable[[NodeEvent], None]) -> int:
    """Serve until stopped; what keeps the node from it is reported. Returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    try:
        trio.run(run_node, config, loader_of(config), report)
    except (DsdError, BaseExceptionGroup) as exc:
        if not isinstance(cause := first_cause(exc), DsdError):
            raise
        report(Failed(text=str(cause)))
        return 1
    return 0


def loader_of(config: NodeConfig) -> LoadStage:
    """Return what loads the configured stage; torch is imported only where a real model needs it.

    Raises:
        ModelError: the model cannot be had.
    """
    if config.recorded is not None:
        from node.recorded import load_recorded

        return load_recorded
    from dsd_p2p.models.source import find_model
    from node.stage_models import load_span_of

    with ConsoleProgress() as progress:
        return partial(load_span_of, find_model(config.model, progress))
