"""Implements `dsd members`: list the swarm's members as this machine's peer sees them."""

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p import units
from dsd_p2p.types import short_peer
from node.config import SwarmQuestion
from node.member.control import MemberStatus, PeerReport, Status, ask_node
from node.member.state import SwarmState


def run(config: SwarmQuestion) -> int:
    """Print a table, or one JSON object."""
    state = SwarmState(config.swarm)
    status = trio.run(ask_node, state.control_socket, Status())
    assert isinstance(status, PeerReport)
    if config.json:
        print(msgspec.json.encode(status).decode())
        return 0
    table = Table(box=None)
    for column in ("member", "state", "layers", "ms/layer", "round trip", "sessions", "since", "address"):
        table.add_column(column)
    for member in sorted(status.members, key=lambda m: (not m.is_alive, m.span, m.peer)):
        table.add_row(*_row(member, status.peer))
    Console().print(table)
    if status.uncovered:
        print(
            f"no peer serves some of the layers {status.uncovered[0]}..{status.uncovered[-1]}: add a machine with `dsd join`"
        )
    return 0


def _row(member: MemberStatus, me: str) -> tuple[str, ...]:
    name = f"{short_peer(member.peer)}" + (" (this)" if member.peer == me else "")
    state = member.state if member.is_alive else "left" if member.state == "left" else "not reached"
    trip = (
        "" if member.round_trip_s is None else f"{member.round_trip_s * 1e3:.0f} ms" + (" relayed" * member.is_relayed)
    )
    layer = f"{member.layer_s * 1e3:.2f}" if member.max_layers else ""
    span = member.span or ("client" if not member.max_layers else "")
    address = member.addresses[0].partition("/p2p/")[0] if member.addresses else ""
    return (name, state, span, layer, trip, str(member.num_sessions), units.duration(member.age_s), address)
