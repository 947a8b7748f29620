"""Reports the status of this peer every second, and a coordinator's view of its stages."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import trio

from dsd_p2p.errors import PeerError
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.server import StageServer
from dsd_p2p.telemetry.events import Event, PeerStatus

_STATUS_S = 1.0
_PING_S = 5.0
_PING_TIMEOUT_S = 4.0
_MAX_PINGED = 32


@dataclass(slots=True, kw_only=True)
class StatusSource:
    """Builds the status of a peer.

    server, budget: only of a peer that serves a stage. budget: a function, because moving to other layers changes it.
    """

    links: PeerLinks
    roles: tuple[str, ...]
    server: StageServer | None = None
    budget: Callable[[], CacheBudget | None] = lambda: None
    state: Callable[[], str] = lambda: "serving"
    num_dropped: Callable[[], int] = lambda: 0
    model: str = ""
    version: str = field(default_factory=lambda: version("dsd-p2p"))
    links_s: dict[str, float] = field(default_factory=dict)
    _busy_s: float = 0.0
    _at_s: float = field(default_factory=time.perf_counter)

    def status(self) -> PeerStatus:
        """Return the peer's status. Its busy share covers the time since the last call."""
        me, server, budget = self.links.me, self.server, self.budget()
        now_s, busy_s = time.perf_counter(), server.work.busy_s if server else 0.0
        share = (busy_s - self._busy_s) / max(1e-3, now_s - self._at_s)
        self._busy_s, self._at_s = busy_s, now_s
        return PeerStatus(
            at_s=time.time(),
            peer=me.peer,
            roles=self.roles,
            version=self.version,
            model=self.model or me.model_name,
            dtype=me.model.weights if me.model else "",
            first=me.span.first if me.span else 0,
            last=me.span.last if me.span else 0,
            num_layers=me.num_layers,
            state=self.state(),
            num_sessions=server.num_sessions if server else 0,
            queue=server.work.num_waiting if server else 0,
            busy_share=min(1.0, max(0.0, share)),
            cache_bytes=budget.used_bytes - (server.parked_bytes if server else 0) if budget else 0,
            max_cache_bytes=budget.max_bytes if budget else 0,
            num_passes=server.work.num_passes if server else 0,
            num_windows=server.work.num_windows if server else 0,
            links_s=dict(self.links_s),
            num_dropped=self.num_dropped(),
        )


async def report_forever(
    source: StatusSource, tell: Callable[[Event], None], look_around: Callable[[], None] = lambda: None
) -> None:
    """Report the peer's status every second, and measure its links every 5 s. look_around: called after each report."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_measure_links, source)
        while True:
            tell(source.status())
            look_around()
            await trio.sleep(_STATUS_S)


async def _measure_links(source: StatusSource) -> None:
    links = source.links
    while True:
        stages = [peer for peer in links.connected if (info := links.known.get(peer)) and info.span is not None]
        for peer in stages[:_MAX_PINGED]:
            try:
                source.links_s[peer] = await links.round_trip_s(peer, _PING_TIMEOUT_S)
            except PeerError:
                source.links_s.pop(peer, None)
        for gone in source.links_s.keys() - links.connected:
            del source.links_s[gone]
        await trio.sleep(_PING_S)


def seen_peers(links: PeerLinks) -> list[PeerStatus]:
    """Return the status of each known stage as the coordinator sees it."""
    return [
        PeerStatus(
            at_s=time.time(),
            peer=peer,
            is_online=links.is_connected(peer),
            roles=("stage",),
            model=info.model_name,
            dtype=info.model.weights if info.model else "",
            first=info.span.first,
            last=info.span.last,
            num_layers=info.num_layers,
        )
        for peer, info in links.known.items()
        if info.span is not None
    ]
