"""Implements `dsd invite`: print an invite as a string and as a QR code."""

import secrets
import sys
import time

import segno
import trio

from dsd_p2p import units
from dsd_p2p.errors import ConfigError, PeerTimeout
from dsd_p2p.keys import peer_of
from dsd_p2p.swarm.invite import InviteTerms, SwarmSettings, new_invite
from dsd_p2p.types import short_peer
from node.config import InviteConfig
from node.console import console
from node.member.control import PeerReport, Status, ask_node
from node.member.state import IssuedInvite, SwarmState

_MAX_BOOTSTRAP = 4


def run(config: InviteConfig) -> int:
    """Print the invite on standard output and the QR code on standard error."""
    state = SwarmState(config.swarm)
    stored, owner = state.membership(), state.owner_key()
    bootstrap = config.address or trio.run(_bootstrap, state)
    invite = new_invite(
        owner,
        secrets.token_bytes(32),
        InviteTerms(
            role=config.role, expires_at_s=int(time.time() + units.seconds(config.expires)), max_uses=config.uses
        ),
        SwarmSettings(
            network_key=stored.network_key,
            bootstrap=tuple(bootstrap)[:_MAX_BOOTSTRAP],
            model=stored.model,
            dtype=stored.dtype,
            digest=stored.digest,
            choice=state.choice(),
            key_made_at_ms=stored.key_made_at_ms,
        ),
    )
    state.issue(
        IssuedInvite(
            subject=invite.grants[-1].subject,
            role=config.role,
            expires_at_s=invite.grants[-1].expires_at_s,
            max_uses=config.uses,
        )
    )
    if config.qr and sys.stderr.isatty():
        segno.make(str(invite), error="l").terminal(out=sys.stderr, compact=True)
    console.print(
        f"for {config.uses} member(s) with role {config.role}, valid for {config.expires}; anyone who has it can join:"
    )
    console.print(f"its id is {short_peer(peer_of(invite.grants[-1].subject))}; `dsd invites` tells who has used it")
    print(f"{invite}", flush=True)
    return 0


async def _bootstrap(state: SwarmState) -> tuple[str, ...]:
    """Return the addresses of this machine's peer and of other members."""
    try:
        status = await ask_node(state.control_socket, Status())
    except (ConfigError, PeerTimeout) as exc:
        raise ConfigError(
            f"{exc}; an invite needs an address to join at: start the node daemon, or give --address"
        ) from exc
    assert isinstance(status, PeerReport)
    # Loopback addresses work only on this machine, so they come last.
    others = [
        m.addresses[0] for m in status.members if m.is_alive and m.addresses and m.peer != status.peer and m.max_layers
    ]
    found = [*status.addresses[:2], *others, *status.addresses[2:]]
    return tuple(dict.fromkeys(found))
