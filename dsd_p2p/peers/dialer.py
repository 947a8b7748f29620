"""Keeps a member connected to every peer that can hold layers, and finds it a peer when it is alone."""

import logging
from collections.abc import Iterable, Sequence

import trio

from dsd_p2p.errors import ConfigError, PeerError
from dsd_p2p.peers.gatekeeper import Bell
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.types import PeerId, UniformRng
from dsd_p2p.wire.membership import MemberRecord, MemberState

logger = logging.getLogger(__name__)

_DIAL_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0
_YIELD_S = 3.0
"""When two members learn of each other at once, the one with the greater id waits this long before it dials."""

_MAX_FOUND = 8

_MAX_ADDRESSES = 4
"""Addresses of one member that are tried, of those that it names."""

_MAX_DIALS = 8
"""Members that are dialled at once. So nobody's records make us open a hundred connections."""


class Dialer:
    """The dialer of one member.

    bootstrap: addresses to try when we are connected to nobody. met: rings when a dial succeeds or an address is added.
    last_failure: why the last attempt failed, or the first refusal. is_refused: True once a member refused us.
    """

    def __init__(self, links: PeerLinks, bootstrap: Sequence[str], rng: UniformRng, met: Bell) -> None:
        self._links = links
        self._bootstrap = tuple(bootstrap)
        self._found: tuple[str, ...] = ()
        self._rng = rng
        self._met = met
        self._next_dial_s: dict[str, float] = {}
        self._backoff_s: dict[str, float] = {}
        self._dialing: set[str] = set()
        self._age: dict[str, tuple[int, int]] = {}
        self.last_failure = ""
        self.is_refused = False

    def also_try(self, address: str) -> None:
        """Add an address to try like those of the bootstrap list; only the latest eight are kept."""
        if address not in (*self._bootstrap, *self._found):
            self._found = (*self._found, address)[-_MAX_FOUND:]
            self._met.ring()

    def dial(self, records: Iterable[MemberRecord], nursery: trio.Nursery) -> None:
        """Dial every member that serves layers or drafts and is not connected; when we are alone, the bootstrap list too."""
        now_s = trio.current_time()
        for record in records:
            peer = PeerId(record.info.peer)
            profile = record.profile
            is_of_use = profile.max_layers > 0 or record.info.span is not None or bool(profile.drafter)
            if peer == self._links.me.peer or not is_of_use or record.state is MemberState.LEFT:
                continue
            is_news = record.age != self._age.get(peer)
            self._age[peer] = record.age
            if peer in self._links.connected:
                self._next_dial_s.pop(peer, None)
                self._backoff_s.pop(peer, None)
                continue
            # Somebody else has just heard from it, so it can be reached again. A stage dials no clients: they must.
            is_back = is_news and self._backoff_s.pop(peer, None) is not None
            if peer not in self._next_dial_s or is_back:
                self._next_dial_s[peer] = now_s + (_YIELD_S if peer < self._links.me.peer else 0.0)
            self._try(peer, record.info.addresses, nursery)
        if not self._links.connected:
            for address in (*self._bootstrap, *self._found):
                # Named by peer, because two dials of one peer at once, one to a stale address, block each other.
                self._try(address.rpartition("/p2p/")[2], (address,), nursery)

    def _try(self, name: str, addresses: Sequence[str], nursery: trio.Nursery) -> None:
        is_due = trio.current_time() >= self._next_dial_s.get(name, 0.0)
        if addresses and name not in self._dialing and is_due and len(self._dialing) < _MAX_DIALS:
            self._dialing.add(name)
            nursery.start_soon(self._connect, name, addresses)

    async def _connect(self, name: str, addresses: Sequence[str]) -> None:
        try:
            for address in addresses[:_MAX_ADDRESSES]:
                try:
                    await self._links.connect(address, _DIAL_TIMEOUT_S)
                except (PeerError, ConfigError) as exc:
                    logger.info("member not reached address=%s error=%s", address, exc)
                    # A refusal tells more than an unreachable peer, so keep it.
                    if not self.is_refused:
                        self.last_failure = str(exc)
                    self.is_refused = self.is_refused or "refused us" in self.last_failure
                else:
                    self._backoff_s.pop(name, None)
                    self._met.ring()
                    return
            backoff_s = min(2 * self._backoff_s.get(name, _FIRST_BACKOFF_S / 2), _MAX_BACKOFF_S)
            self._backoff_s[name] = backoff_s
            self._next_dial_s[name] = trio.current_time() + backoff_s * (0.5 + self._rng.random() / 2)
        finally:
            self._dialing.discard(name)
