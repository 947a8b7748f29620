"""Decides who belongs to a swarm now: whose grants are valid, which invites are used up, and who was revoked.

How it works. A peer shows its grants when it connects, and again in its record. Both are checked here. The grants of each
connection are kept, so whoever is revoked or expires is found even if it never published a record. Uses and revocations
must survive a restart: `note` stores them before anybody profits from them.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import msgspec

from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.keys import peer_of
from dsd_p2p.swarm.grants import check_grants, is_revocation_valid
from dsd_p2p.types import PeerId
from dsd_p2p.wire.membership import MAX_REVOCATIONS, Grant, Revocation, Role

_MAX_USES = 1 << 16


class Authority(msgspec.Struct, frozen=True, kw_only=True):
    """What must never be forgotten. uses: the keys that each issuer let in, as (issuer, keys)."""

    revocations: tuple[Revocation, ...] = ()
    uses: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()


class Admission:
    """Who may be here, as one member knows it. swarm: the owner's public key.

    note: stores what must not be forgotten; it raises CapacityError if it cannot.
    """

    def __init__(self, swarm: bytes, note: Callable[[Authority], None] = lambda _authority: None) -> None:
        self._swarm = swarm
        self._note = note
        self._revocations: dict[bytes, Revocation] = {}
        self._used: dict[bytes, dict[bytes, None]] = {}
        self._grants_of: dict[PeerId, tuple[Grant, ...]] = {}

    def recall(self, authority: Authority) -> None:
        """Take over what was stored before a restart.

        Raises:
            RemoteProtocolError, CapacityError: it is not this swarm's.
        """
        for revocation in authority.revocations:
            self._add(revocation)
        self._used = {issuer: dict.fromkeys(keys) for issuer, keys in authority.uses}

    def admit(self, peer: PeerId, grants: Sequence[Grant], unix_s: float) -> Role:
        """Return the role of `peer`, and note the use of its invite.

        Raises:
            RemoteProtocolError: the invite is missing, foreign, forged, expired, revoked or used up; says which.
            CapacityError: the use cannot be noted.
        """
        role = check_grants(grants, swarm=self._swarm, peer=peer, now_s=unix_s)
        for grant in grants:
            if grant.subject in self._revocations:
                raise RemoteProtocolError(
                    "invite", f"{peer_of(grant.subject)} was revoked", "an invite that is not revoked"
                )
        links = list(itertools.pairwise(grants))
        for before, grant in links:
            used = self._used.get(before.subject, {})
            if grant.subject not in used and len(used) >= before.max_uses:
                raise RemoteProtocolError(
                    "invite", f"used by {len(used)} others", f"at most {before.max_uses} uses (ask for a new one)"
                )
        self._use([(before.subject, grant.subject) for before, grant in links])
        return role

    def _use(self, uses: Iterable[tuple[bytes, bytes]]) -> None:
        new = [(issuer, key) for issuer, key in uses if key not in self._used.get(issuer, {})]
        if not new:
            return
        if sum(map(len, self._used.values())) + len(new) > _MAX_USES:
            raise CapacityError(f"the swarm's invites have {_MAX_USES} uses, which is the limit: make a new swarm")
        for issuer, key in new:
            self._used.setdefault(issuer, {})[key] = None
        try:
            self._note(self.stored)
        except CapacityError:
            for issuer, key in new:
                del self._used[issuer][key]
            raise

    def revoke(self, revocation: Revocation) -> bool:
        """Add a revocation; return whether it is new.

        Raises:
            RemoteProtocolError: the owner did not sign it.
            CapacityError: there are too many revocations, or it cannot be noted. It holds until the restart.
        """
        is_new = self._add(revocation)
        if is_new:
            self._note(self.stored)
        return is_new

    def _add(self, revocation: Revocation) -> bool:
        if revocation.subject in self._revocations:
            return False
        if not is_revocation_valid(revocation, self._swarm):
            raise RemoteProtocolError("revocation signature", revocation.signature.hex()[:12], "the swarm owner's")
        if len(self._revocations) >= MAX_REVOCATIONS:
            raise CapacityError(f"the swarm has {MAX_REVOCATIONS} revocations, which is the limit: make a new swarm")
        self._revocations[revocation.subject] = revocation
        return True

    @property
    def revocations(self) -> tuple[Revocation, ...]:
        """All known revocations."""
        return tuple(self._revocations.values())

    @property
    def stored(self) -> Authority:
        """What must survive a restart."""
        return Authority(
            revocations=self.revocations, uses=tuple((issuer, tuple(keys)) for issuer, keys in self._used.items())
        )

    # Connections

    def connected(self, peer: PeerId, grants: Sequence[Grant]) -> None:
        """Keep the grants that a peer has shown on its connection."""
        self._grants_of[peer] = tuple(grants)

    def lost(self, peer: PeerId) -> None:
        """Forget the grants of a connection that has ended."""
        self._grants_of.pop(peer, None)

    def root_of(self, peer: PeerId) -> str:
        """Return the first key in the grants of a connected peer, as hex; the peer itself if it is not connected."""
        grants = self._grants_of.get(peer)
        return grants[0].subject.hex() if grants else peer

    def why_not(self, grants: Sequence[Grant], unix_s: float) -> str:
        """Return why grants that were once accepted are not valid any more, or an empty string."""
        if any(grant.subject in self._revocations for grant in grants):
            return "revoked"
        return "its invite expired" if any(unix_s >= grant.expires_at_s for grant in grants) else ""

    def overdue(self, unix_s: float) -> list[tuple[PeerId, str]]:
        """Return each connected peer that may not be here any more, and why."""
        found = ((peer, self.why_not(grants, unix_s)) for peer, grants in self._grants_of.items())
        return [(peer, why) for peer, why in found if why]
