"""Adds up events to a picture of the swarm: its peers, its requests and its problems. No I/O and no clock."""

from collections import Counter, deque
from dataclasses import dataclass, field

from dsd_p2p.telemetry.events import Event, PeerStatus, Replayed, SessionEnded, SessionStarted, StageOf, WindowVerified
from dsd_p2p.types import short_peer

_MAX_PEERS, _MAX_SESSIONS, _MAX_HISTORY = 4096, 1024, 32
_KEEP_ENDED_S = 10.0
_KEEP_SILENT_S = 300.0
_SILENT_S = 6.0
"""A peer that sends no status for this long is silent; it should send one every second."""

_SERIES_S = 1.0
_SERIES = 120
_RATE_S = 5.0
_LONG_QUEUE = 64


@dataclass(slots=True, kw_only=True)
class SessionView:
    """The state of one request. at_s: time of its last event."""

    session: str
    coordinator: str
    at_s: float
    started_at_s: float
    stages: tuple[StageOf, ...] = ()
    drafter: str = ""
    num_prompt_tokens: int = 0
    max_tokens: int = 0
    newest: WindowVerified = field(default_factory=WindowVerified)
    ended: SessionEnded | None = None
    num_replays: int = 0
    is_from_its_start: bool = False
    samples: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=128))

    def tokens_per_s(self, now_s: float) -> float:
        """Return the tokens a second over the last five seconds; 0 once the request ended."""
        recent = [(at_s, count) for at_s, count in self.samples if at_s >= now_s - _RATE_S]
        if len(recent) < 2 or self.ended is not None:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / max(1e-3, now_s - recent[0][0])


@dataclass(frozen=True, slots=True)
class Alert:
    """A problem that somebody should look at. level: 2 is broken, 1 is worth a look."""

    level: int
    text: str


class Picture:
    """The state of a swarm, added up from its events. Its size is bounded, whatever arrives."""

    def __init__(self) -> None:
        self.peers: dict[str, PeerStatus] = {}
        self.heard_at_s: dict[str, float] = {}
        self.sessions: dict[str, SessionView] = {}
        self.totals: Counter[str] = Counter()
        self.hits_by_depth: list[int] = []
        self.outcomes_by_depth: list[int] = []
        self.replays: deque[Replayed] = deque(maxlen=_MAX_HISTORY)
        self.errors: deque[SessionEnded] = deque(maxlen=_MAX_HISTORY)
        self.series: deque[int] = deque(maxlen=_SERIES)
        self.now_s = 0.0
        self._bucket: int | None = None
        self.num_events = 0

    def add(self, event: Event) -> None:
        """Add an event. The time never runs backwards."""
        self.num_events += 1
        self._pass_time(event.at_s)
        match event:
            case PeerStatus(peer=peer):
                if peer in self.peers or len(self.peers) < _MAX_PEERS:
                    self.peers[peer] = event
                    self.heard_at_s[peer] = self.now_s
            case SessionStarted():
                self._start(event)
            case WindowVerified():
                self._window(event)
            case Replayed():
                view = self._view(event.session, event.coordinator)
                view.stages, view.num_replays, view.at_s = event.stages, view.num_replays + 1, self.now_s
                self.totals["replays"] += 1
                self.replays.append(event)
            case SessionEnded():
                self._end(event)

    def tick(self, now_s: float) -> None:
        """Let time pass without an event, and forget requests that are over."""
        self._pass_time(now_s)
        for name in [name for name, view in self.sessions.items() if self._is_over(view)]:
            del self.sessions[name]

    @property
    def running(self) -> list[SessionView]:
        """The running requests, newest first."""
        views = [view for view in self.sessions.values() if view.ended is None]
        return sorted(views, key=lambda view: -view.started_at_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all requests together, over the last five full seconds."""
        recent = list(self.series)[-1 - int(_RATE_S) : -1]
        return sum(recent) / (len(recent) * _SERIES_S) if recent else 0.0

    def acceptance(self) -> list[float]:
        """Return, for each depth below the root, how often a drafted level held the target's token."""
        pairs = zip(self.hits_by_depth, self.outcomes_by_depth, strict=False)
        return [hits / outcomes for hits, outcomes in pairs if outcomes]

    def is_silent(self, peer: str) -> bool:
        """True if the peer has sent no status for too long."""
        return self.now_s - self.heard_at_s.get(peer, 0.0) > _SILENT_S

    def alerts(self) -> list[Alert]:
        """Return what somebody should look at, the worst first."""
        alerts: list[Alert] = []
        for peer, status in self.peers.items():
            name = short_peer(peer)
            if not status.is_online:
                alerts.append(Alert(2, f"{name} is offline"))
            elif self.is_silent(peer):
                alerts.append(Alert(2, f"{name} has sent no status for {self.now_s - self.heard_at_s[peer]:.0f} s"))
            if status.queue > _LONG_QUEUE:
                alerts.append(Alert(1, f"{name} has {status.queue} windows waiting"))
            if status.max_cache_bytes and status.cache_bytes > 0.9 * status.max_cache_bytes:
                alerts.append(Alert(1, f"{name} has less than a tenth of its cache free"))
            if status.num_dropped:
                alerts.append(Alert(1, f"{name} dropped {status.num_dropped} events"))
        recent = [each for each in self.replays if each.at_s >= self.now_s - 30]
        if recent:
            alerts.append(Alert(1, f"{len(recent)} route(s) lost in the last 30 s"))
        failed = [each for each in self.errors if each.at_s >= self.now_s - 60]
        if failed:
            alerts.append(Alert(2, f"{len(failed)} request(s) failed in the last minute: {failed[-1].error}"))
        return sorted(alerts, key=lambda alert: -alert.level)

    def _pass_time(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)
        bucket = int(self.now_s / _SERIES_S)
        # After a long silence only the newest buckets matter.
        num_new = 1 if self._bucket is None else min(_SERIES, bucket - self._bucket)
        self.series.extend([0] * num_new)
        self._bucket = bucket

    def _view(self, session: str, coordinator: str) -> SessionView:
        if (view := self.sessions.get(session)) is None:
            while len(self.sessions) >= _MAX_SESSIONS:
                ended = (name for name, known in self.sessions.items() if known.ended is not None)
                del self.sessions[next(ended, next(iter(self.sessions)))]
            view = self.sessions[session] = SessionView(
                session=session, coordinator=coordinator, at_s=self.now_s, started_at_s=self.now_s
            )
        return view

    def _start(self, event: SessionStarted) -> None:
        # The event is repeated when a listener comes back; count it once.
        self.totals["sessions"] += event.session not in self.sessions
        view = self._view(event.session, event.coordinator)
        view.stages, view.drafter, view.max_tokens = event.stages, event.drafter, event.max_tokens
        view.num_prompt_tokens = event.num_prompt_tokens
        view.is_from_its_start = self.now_s - event.at_s < _SERIES_S

    def _window(self, event: WindowVerified) -> None:
        view = self._view(event.session, event.coordinator)
        before, view.newest, view.at_s = view.newest, event, self.now_s
        view.drafter = event.drafter or view.drafter
        for name in ("num_tokens", "num_windows", "num_nodes", "num_misses", "num_stale", "num_relaxed"):
            self.totals[name] += max(0, getattr(event, name) - getattr(before, name))
        # Tokens that a request wrote before we listened say nothing about the current speed.
        if view.samples or view.is_from_its_start:
            self.series[-1] += max(0, event.num_tokens - before.num_tokens)
        view.samples.append((self.now_s, event.num_tokens))
        _add_growth(self.hits_by_depth, event.hits_by_depth, before.hits_by_depth)
        _add_growth(self.outcomes_by_depth, event.outcomes_by_depth, before.outcomes_by_depth)

    def _end(self, event: SessionEnded) -> None:
        view = self._view(event.session, event.coordinator)
        num_untold = max(0, event.num_tokens - view.newest.num_tokens)
        self.totals["num_tokens"] += num_untold
        self.series[-1] += num_untold
        view.ended, view.at_s = event, self.now_s
        self.totals["ended"] += 1
        if event.error:
            self.totals["failed"] += 1
            self.errors.append(event)

    def _is_over(self, view: SessionView) -> bool:
        # A request that falls silent without ending has lost its coordinator.
        return self.now_s - view.at_s > (_KEEP_ENDED_S if view.ended is not None else _KEEP_SILENT_S)


def _add_growth(sums: list[int], new: tuple[int, ...], old: tuple[int, ...]) -> None:
    sums.extend([0] * (len(new) - len(sums)))
    for index, count in enumerate(new):
        sums[index] += max(0, count - (old[index] if index < len(old) else 0))
