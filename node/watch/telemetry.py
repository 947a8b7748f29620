"""What a node tells of itself, and where to: its own picture, whoever listens over HTTP, a broker."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import trio

from dsd_p2p.errors import ConfigError, PeerError
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.server import StageServer
from dsd_p2p.telemetry.events import Event, PeerStatus, SessionStarted, WindowVerified, arrived, encode_event
from dsd_p2p.telemetry.mqtt import Broker, MqttPublisher, MqttSubscriber, parse_broker
from dsd_p2p.telemetry.picture import Picture

logger = logging.getLogger(__name__)

NO_BROKER = "none"
TOPICS = "local"
"""What the topics of a swarm without a name are under."""

_STATUS_S = 1.0
_PING_S = 5.0
_PING_TIMEOUT_S = 4.0
_MAX_PINGED = 32
_MAX_LISTENERS = 64
_QUEUED_EVENTS = 1024
_MAX_SPEAKING = 4096


class EventHub:
    """Adds events up to a picture and passes them on; of one trio loop. speaking: peers that tell of themselves."""

    def __init__(self) -> None:
        self.picture = Picture()
        self._listeners: set[trio.MemorySendChannel[Event]] = set()
        self._sinks: list[Callable[[Event], None]] = []
        self.speaking: set[str] = set()

    def pass_on_to(self, sink: Callable[[Event], None]) -> None:
        """From now on hand our own events to `sink`, too."""
        self._sinks.append(sink)

    def tick(self) -> None:
        """Let time pass, so that what is over is forgotten."""
        self.picture.tick(time.time())

    def tell(self, event: Event) -> None:
        """Take in an event of our own."""
        self.hear(event)
        for sink in self._sinks:
            sink(event)

    def hear_from(self, author: str, event: Event) -> None:
        """Take in what a peer says itself."""
        if len(self.speaking) < _MAX_SPEAKING:
            self.speaking.add(author)
        self.hear(event)

    def hear(self, event: Event) -> None:
        """Take in an event, whoever told it."""
        self.picture.add(event)
        for listener in self._listeners:
            # One that does not keep up misses some; totals make up for it.
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                listener.send_nowait(event)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[tuple[list[Event], trio.MemoryReceiveChannel[Event]] | None]:
        """Yield what makes up the picture now, and what comes from now on; None when too many listen already."""
        if len(self._listeners) >= _MAX_LISTENERS:
            yield None
            return
        put, take = trio.open_memory_channel[Event](_QUEUED_EVENTS)
        self._listeners.add(put)
        try:
            yield snapshot(self.picture), take
        finally:
            self._listeners.discard(put)
            put.close()
            take.close()


def snapshot(picture: Picture) -> list[Event]:
    """Return events that add up to what is running in a picture."""
    events: list[Event] = list(picture.peers.values())
    for view in picture.running:
        events.append(
            SessionStarted(
                at_s=view.started_at_s,
                session=view.session,
                coordinator=view.coordinator,
                stages=view.stages,
                num_prompt_tokens=view.num_prompt_tokens,
                max_tokens=view.max_tokens,
                drafter=view.drafter,
            )
        )
        if view.newest != WindowVerified():
            events.append(view.newest)
    return events


@dataclass(slots=True, kw_only=True)
class StatusSource:
    """Where a node's status comes from. server, budget: of a node that serves a stage; budget is asked anew each time."""

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
        """Return how the node is; busy since the last call."""
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
    """Tell the node's status every second, and measure its links now and then. look_around: called beside it."""
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
    """Return what a coordinator knows of its stages without their word."""
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


def broker_of(url: str, ca_file: str, swarm: str) -> Broker | None:
    """Return the broker of `--mqtt`; None when there is none.

    Raises:
        ConfigError: it is no broker's URL.
    """
    return None if url in ("", NO_BROKER) else parse_broker(url, swarm=swarm, ca_file=ca_file)


@contextmanager
def recording(file: str) -> Iterator[Callable[[Event], None]]:
    """Append what is told to a file, each line at once, until the end of the block; without a file, to nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    if not file:
        yield lambda _event: None
        return
    try:
        lines = Path(file).open("ab", buffering=0)  # noqa: SIM115 - closed below
    except OSError as exc:
        raise ConfigError(f"recording {file}: {exc.strerror}") from exc
    with lines:
        is_broken = False

        def tell(event: Event) -> None:
            nonlocal is_broken
            if is_broken:
                return
            try:
                lines.write(encode_event(event) + b"\n")
            except OSError as exc:
                is_broken = True
                logger.warning("recording ends file=%s error=%s", file, exc)

        yield tell


@asynccontextmanager
async def tracing(url: str, peer: str) -> AsyncIterator[Callable[[Event], None]]:
    """Send OpenTelemetry traces of a peer's requests to a collector until the end of the block; without one, nowhere.

    url: what `check_collector` has accepted.
    """
    if not url:
        yield lambda _event: None
        return
    from dsd_p2p.telemetry.traces import Traces, export_to

    # Each failed batch is an error of its own; its retries are not worth a line.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    traces = Traces(export_to(url), peer, version("dsd-p2p"))
    try:
        yield traces.tell
    finally:
        traces.end()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(traces.close)


def check_collector(url: str) -> None:
    """Say what is wrong with `--otlp` before anything slow begins.

    Raises:
        ConfigError: the extra is not installed, or `url` is none of a collector.
    """
    if not url:
        return
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"--otlp {url!r}: give a collector's address, like http://127.0.0.1:4318")
    try:
        import_module("dsd_p2p.telemetry.traces")
    except ImportError as exc:
        raise ConfigError("--otlp needs an extra: .venv/bin/pip install -c constraints.txt -e '.[otel]'") from exc


@asynccontextmanager
async def publishing(broker: Broker | None, peer: str) -> AsyncIterator[MqttPublisher | None]:
    """Publish a peer's events until the end of the block; without a broker, nothing."""
    if broker is None:
        yield None
        return
    publisher = MqttPublisher(broker, peer)
    publisher.start()
    try:
        yield publisher
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(publisher.close)


@asynccontextmanager
async def hearing(broker: Broker | None, hub: EventHub, me: str) -> AsyncIterator[None]:
    """Let the hub hear what others tell the broker."""
    if broker is None:
        yield
        return
    token = trio.lowlevel.current_trio_token()

    def heard(event: Event) -> None:
        author = event.peer if isinstance(event, PeerStatus) else event.coordinator
        if author != me:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(hub.hear_from, author, arrived(event, time.time()))

    subscriber = MqttSubscriber(broker, heard)
    subscriber.start()
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(subscriber.close)
