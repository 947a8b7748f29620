"""Sends a process's events to a recording, a trace collector or a broker, and receives others' from the broker."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import trio

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.events import Event, PeerStatus, arrived, encode_event
from dsd_p2p.telemetry.mqtt import Broker, MqttPublisher, MqttSubscriber, parse_broker
from node.watch.hub import EventHub

logger = logging.getLogger(__name__)

NO_BROKER = "none"
TOPICS = "local"
"""Swarm name in the topics of a swarm that has no name."""


def broker_of(url: str, ca_file: str, swarm: str) -> Broker | None:
    """Return the broker of `--mqtt`, or None if there is none.

    Raises:
        ConfigError: `url` is not the URL of a broker.
    """
    return None if url in ("", NO_BROKER) else parse_broker(url, swarm=swarm, ca_file=ca_file)


@contextmanager
def recording(file: str) -> Iterator[Callable[[Event], None]]:
    """Yield a function that appends an event to a file, unbuffered. Without a file, it does nothing.

    Raises:
        ConfigError: the file cannot be written.
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
    """Yield a function that sends traces of a peer's requests to an OpenTelemetry collector. Without a URL, it is idle.

    url: checked by `check_collector` before.
    """
    if not url:
        yield lambda _event: None
        return
    from dsd_p2p.telemetry.traces import Traces, export_to

    # Every failed batch is logged as an error. Its retries are not worth a line each.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    traces = Traces(export_to(url), peer, version("dsd-p2p"))
    try:
        yield traces.tell
    finally:
        traces.end()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(traces.close)


def check_collector(url: str) -> None:
    """Check `--otlp` before anything slow starts.

    Raises:
        ConfigError: the extra is not installed, or `url` is not the URL of a collector.
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
    """Yield a publisher of a peer's events, or None without a broker."""
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
    """Pass events that other peers publish at the broker to the hub, until the end of the block."""
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
