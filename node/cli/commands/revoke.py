"""Implements `dsd revoke PEER`: let the owner remove a member from the whole swarm."""

import trio

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.swarm.grants import revoke
from dsd_p2p.swarm.keys import public_of
from node.config import RevokeConfig
from node.member.control import PeerReport, Revoke, Status, ask_node
from node.member.state import SwarmState


def run(config: RevokeConfig) -> int:
    """Sign the revocation and let this machine's node daemon spread it."""
    state = SwarmState(config.swarm)
    owner, stored = state.owner_key(), state.membership()
    peer = trio.run(_full_id, state, config.peer)
    trio.run(ask_node, state.control_socket, Revoke(revocation=revoke(owner, stored.swarm, public_of(peer))))
    print(f"{peer} is revoked")
    return 0


async def _full_id(state: SwarmState, name: str) -> str:
    """Return the peer id that equals `name` or ends in it."""
    status = await ask_node(state.control_socket, Status())
    assert isinstance(status, PeerReport)
    found = [member.peer for member in status.members if member.peer.endswith(name.lstrip("…"))]
    if len(found) == 1:
        return found[0]
    try:
        public_of(name)
    except RemoteProtocolError as exc:
        raise ConfigError(
            f"{name!r} matches the ids of {len(found)} members, expected one: see `dsd members --json`"
        ) from exc
    return name
