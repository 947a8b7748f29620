"""Implements `dsd revoke`: let the owner remove a member, or an invite and all who came with it, from the whole swarm."""

import trio

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.keys import peer_of, public_of
from dsd_p2p.swarm.grants import revoke
from dsd_p2p.types import short_peer
from node.config import RevokeConfig
from node.member.control import PeerReport, Revoke, Status, ask_node
from node.member.state import SwarmState


def run(config: RevokeConfig) -> int:
    """Sign the revocations and let this machine's node daemon spread them."""
    state = SwarmState(config.swarm)
    owner, stored = state.owner_key(), state.membership()
    status = trio.run(ask_node, state.control_socket, Status())
    assert isinstance(status, PeerReport)
    invites = [peer_of(each.subject) for each in state.issued()]
    name = _full_id(config.peer, [*(member.peer for member in status.members), *invites, *status.uses])
    if name == status.peer:
        raise ConfigError("this machine's own peer cannot be revoked: it owns the swarm")
    revoked = [name]
    invite = next((each for each, peers in status.uses.items() if name in peers and each in invites), "")
    if invite and not config.keep_invite:
        # Who was thrown out could come back under another name with a use that is left.
        revoked.append(invite)
    for each in revoked:
        trio.run(ask_node, state.control_socket, Revoke(revocation=revoke(owner, stored.swarm, public_of(each))))
    print(f"{name} is revoked")
    others = [peer for peer in status.uses.get(revoked[-1], []) if peer != name]
    if revoked[-1] in invites:
        also = f", and with it {', '.join(map(short_peer, others))}" if others else ""
        print(f"the invite {short_peer(revoked[-1])} is revoked{also}")
    return 0


def _full_id(name: str, known: list[str]) -> str:
    """Return the id of a member or an invite that equals `name` or ends in it."""
    found = sorted({each for each in known if each.endswith(name.lstrip("…"))})
    if len(found) == 1:
        return found[0]
    try:
        public_of(name)
    except RemoteProtocolError as exc:
        raise ConfigError(
            f"{name!r} matches {len(found)} members and invites, expected one: see `dsd members` and `dsd invites`"
        ) from exc
    return name
