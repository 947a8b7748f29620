"""Runs a swarm peer in this process."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from dsd_p2p.errors import DsdError, first_cause
from dsd_p2p.wire.membership import PeerProfile
from node.config import NO_GATEWAY, GatewayConfig, ServeFlags
from node.console import ConsoleProgress, console
from node.crash import explain
from node.descriptors import raise_descriptors
from node.local.events import Failed, GatewayOpen, Loading, Ready, StageEvent
from node.member.state import SwarmState

if TYPE_CHECKING:
    from node.member.measure import Machine


def serve_swarm(
    config: ServeFlags,
    report: Callable[[StageEvent], None],
    gateway: GatewayConfig = NO_GATEWAY,
    machine: "Machine | None" = None,
) -> int:
    """Serve until stopped, and return the exit code. Reports `Failed` if the peer cannot start or go on.

    machine: the machine to measure and compute on; default: this one.
    """
    from node.member.measure import ThisMachine
    from node.member.model import find_member_model
    from node.member.node import SwarmPeer
    from node.member.settings import PeerSettings

    machine = machine or ThisMachine()
    raise_descriptors()

    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        state = SwarmState(config.swarm)
        stored = state.membership()
        with ConsoleProgress() as progress:
            source = find_member_model(stored, progress)
        report(Loading(what=config.compute_line(stored.dtype)))
        profile = PeerProfile()
        if config.role == "stage":
            report(Loading(what="measure this machine"))
            profile = machine.measure(source, config, stored.dtype)
        settings = PeerSettings(
            config=config,
            gateway=gateway,
            state=state,
            stored=stored,
            source=source,
            profile=profile,
            machine=machine,
            report=report,
        )
        trio.run(SwarmPeer(settings).run)
    except Exception as exc:  # process boundary: whoever started this peer has to know why
        cause = first_cause(exc)
        report(Failed(text=str(cause) if isinstance(cause, DsdError) else explain(exc, "the node daemon")))
        return 1
    return 0


def tell_user(event: StageEvent) -> None:
    """Print an event of the peer for the user."""
    match event:
        case Loading(what=what):
            console.print(f"[dim]{what} …[/]")
        case Ready(address=address, span=span):
            console.print(f"serving layers {span} at")
            print(address, flush=True)
        case GatewayOpen(url=url):
            print(f"chat at {url}/, OpenAI clients at {url}/v1, dsd top {url}", flush=True)
        case Failed(text=text):
            print(f"dsd node: {text}", file=sys.stderr)
        case _:
            pass
