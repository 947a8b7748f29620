"""Decides by a swarm's registry and a peer's grants whether the peer is let in."""

import logging
from collections.abc import Callable

import trio

from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.types import PeerId
from dsd_p2p.wire.membership import Grant, Role
from dsd_p2p.wire.messages import Hello

logger = logging.getLogger(__name__)


class Bell:
    """An event that can happen again: `wait` returns at the next `ring`."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        """Wake all waiters."""
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        """Wait for the next ring."""
        await self._event.wait()


class SwarmGatekeeper:
    """A `dsd_p2p.peers.links.Gatekeeper` that lets only members in.

    grants: those that we show to other members. unix: returns seconds since 1970. met: rings when a peer is let in.
    """

    def __init__(self, registry: Registry, grants: tuple[Grant, ...], unix: Callable[[], float]) -> None:
        self.registry = registry
        self.grants = grants
        self.met = Bell()
        self._unix = unix

    def admit(self, peer: PeerId, hello: Hello) -> None:
        """Let a member in.

        Raises:
            RemoteProtocolError: the peer is not a member, or holds layers with a client's invite.
        """
        admission = self.registry.admission
        try:
            role = admission.admit(peer, hello.grants, self._unix())
        except CapacityError as exc:
            raise RemoteProtocolError("invite", "one that cannot be noted as used", str(exc)) from exc
        if role is Role.CLIENT and hello.sender.span is not None:
            raise RemoteProtocolError("span", str(hello.sender.span), "none, because its invite is for clients")
        admission.connected(peer, hello.grants)
        logger.info("member let in peer=%s role=%s", peer, role)
        self.met.ring()

    def root_of(self, peer: PeerId) -> str:
        """Return the key that the owner let in: one of the owner's own machines, or the invite that a peer came with."""
        return self.registry.admission.root_of(peer)
