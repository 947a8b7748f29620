"""Implements `dsd invites`: list the invites that this machine has made, and who came with them."""

import time

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p import units
from dsd_p2p.keys import peer_of
from dsd_p2p.types import short_peer
from node.config import SwarmQuestion
from node.member.control import PeerReport, Status, ask_node
from node.member.state import SwarmState


class _Listed(msgspec.Struct):
    """One invite. uses: the ids of the members that came with it."""

    id: str
    role: str
    max_uses: int
    uses: list[str]
    expires_at_s: int
    is_revoked: bool


def run(config: SwarmQuestion) -> int:
    """Print a table, or one JSON list."""
    state = SwarmState(config.swarm)
    state.owner_key()
    status = trio.run(ask_node, state.control_socket, Status())
    assert isinstance(status, PeerReport)
    listed = [
        _Listed(
            id=(name := peer_of(invite.subject)),
            role=invite.role,
            max_uses=invite.max_uses,
            uses=status.uses.get(name, []),
            expires_at_s=invite.expires_at_s,
            is_revoked=name in status.revoked,
        )
        for invite in state.issued()
    ]
    if config.json:
        print(msgspec.json.encode(listed).decode())
        return 0
    table = Table(box=None)
    for column in ("invite", "role", "used", "valid", "members"):
        table.add_column(column)
    for each in listed:
        left_s = each.expires_at_s - time.time()
        valid = "revoked" if each.is_revoked else units.duration(left_s) if left_s > 0 else "expired"
        members = ", ".join(short_peer(peer) for peer in each.uses)
        table.add_row(short_peer(each.id), each.role, f"{len(each.uses)} of {each.max_uses}", valid, members)
    Console().print(table)
    return 0
