"""Gives the members that remain a new network key, so that whoever left or was thrown out does not even reach a greeting.

The owner's message names who is revoked. A member revokes them first, then stores the key, passes the message on to
those who are still there, and after a moment takes connections with the new key only. All old connections end.
"""

import logging
from collections.abc import Callable, Mapping

import trio

from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.peers.links import Arrived
from dsd_p2p.peers.membership import Membership
from dsd_p2p.peers.services import Handler
from dsd_p2p.swarm.grants import is_rekey_valid
from dsd_p2p.transport.base import Lost
from dsd_p2p.wire.membership import Rekey
from dsd_p2p.wire.messages import Message

logger = logging.getLogger(__name__)

_TIMES = 4

SPREAD_S = 2.0
"""How long a member that has the new key stays reachable with the old one, so that all get it."""


class Rekeying:
    """The service (`dsd_p2p.peers.services`) that takes new network keys. since_ms: when the present one was made.

    note: stores a key and when it was made; it raises CapacityError if it cannot.
    """

    def __init__(self, membership: Membership, since_ms: int, note: Callable[[bytes, int], None]) -> None:
        self._membership = membership
        self._since_ms = since_ms
        self._note = note
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Change keys in `nursery`."""
        self._nursery = nursery

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of new keys."""
        return {Rekey: self._hear}

    def lost(self, event: Lost) -> None:
        """Do nothing."""

    async def _hear(self, event: Arrived, rekey: Rekey) -> None:
        try:
            await self.take(rekey)
        except CapacityError:
            logger.exception("new network key not stored: this member stays behind")

    async def take(self, rekey: Rekey) -> None:
        """Revoke, store the key, tell the others, and change to it soon. An older key than ours is ignored.

        Raises:
            RemoteProtocolError: the owner did not sign it.
            CapacityError: it cannot be stored.
        """
        assert self._nursery is not None, "start first"
        membership = self._membership
        if not is_rekey_valid(rekey, membership.registry.swarm):
            raise RemoteProtocolError("signature of the new key", rekey.signature.hex()[:12], "the swarm owner's")
        if rekey.made_at_ms <= self._since_ms:
            return
        membership.take_revocations(rekey.revocations)
        self._note(rekey.key, rekey.made_at_ms)
        self._since_ms = rekey.made_at_ms
        self._nursery.start_soon(self._change, rekey)

    async def _change(self, rekey: Rekey) -> None:
        for _ in range(_TIMES):
            # Again and again, because members come in meanwhile and messages get lost.
            self._membership.pass_on(rekey)
            await trio.sleep(SPREAD_S / _TIMES)
        links = self._membership.links
        links.transport.change_network_key(rekey.key)
        for peer in list(links.connected):
            await links.transport.disconnect(peer, "the swarm has a new network key")
        logger.warning("network key changed")
