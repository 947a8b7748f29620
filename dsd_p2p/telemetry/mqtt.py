"""Publishes and subscribes to events over MQTT (docs/telemetry.md), with an asyncio client in its own thread.

Publishing never waits: events go into a bounded queue, and those that do not fit are counted and dropped. If the broker
is down or does not answer, only this thread waits.
"""

import asyncio
import logging
import ssl
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiomqtt

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.events import DecisionMade, Event, PeerStatus, WindowVerified, decode_event, encode_event

logger = logging.getLogger(__name__)

_MAX_QUEUED = 4096
_MAX_MESSAGE_BYTES = 1 << 18
_ANSWER_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _MAX_RETRY_S = 0.5, 15.0
_STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """The address of a broker and how to log in. topics: the prefix of all topics of the swarm."""

    host: str
    port: int
    topics: str
    user: str | None = None
    password: str | None = None
    is_tls: bool = False
    ca_file: str | None = None


def parse_broker(url: str, *, swarm: str, ca_file: str = "") -> Broker:
    """Return the broker of `mqtt://user:password@host:port` or `mqtts://…`.

    Raises:
        ConfigError: the URL is not of this form, or `ca_file` does not exist.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"broker {_shown(url)!r}: {exc}") from exc
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
        raise ConfigError(f"broker {_shown(url)!r}: expected mqtt://HOST:PORT or mqtts://USER:PASSWORD@HOST:PORT")
    if ca_file and not Path(ca_file).is_file():
        raise ConfigError(f"--mqtt-ca {ca_file}: no such file")
    is_tls = parts.scheme == "mqtts"
    return Broker(
        host=parts.hostname,
        port=port or (8883 if is_tls else 1883),
        topics=f"dsd/v1/{swarm}",
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        is_tls=is_tls,
        ca_file=ca_file or None,
    )


def _shown(url: str) -> str:
    """Return a URL without its password."""
    before, at, after = url.rpartition("@")
    return f"{before.partition('//')[0]}//…@{after}" if at else url


def topic_of(event: Event, topics: str, peer: str) -> tuple[str, int, bool]:
    """Return an event's topic, its quality of service, and whether the broker retains it. peer: the writer."""
    match event:
        case PeerStatus():
            return f"{topics}/peers/{peer}/status", 1, True
        case WindowVerified() | DecisionMade():
            return f"{topics}/peers/{peer}/windows", 0, False
        case _:
            return f"{topics}/peers/{peer}/sessions", 1, False


class _Connection:
    """A thread with an asyncio loop that stays connected to the broker and runs `talk` until `close`."""

    def __init__(
        self,
        broker: Broker,
        name: str,
        talk: Callable[[aiomqtt.Client], Awaitable[None]],
        will: aiomqtt.Will | None = None,
    ) -> None:
        self._broker = broker
        self._talk = talk
        self._will = will
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self.is_connected = False
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Stop, after a short wait for messages under way. Blocks, so call it in a worker thread."""
        self._is_closing = True
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        self._thread.join(_STOP_S)

    def wake(self, event: asyncio.Event) -> None:
        """Set an event of the loop; may be called from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(event.set)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        delay_s = _FIRST_RETRY_S
        while not self._is_closing:
            try:
                async with self._client() as client:
                    self.is_connected, delay_s = True, _FIRST_RETRY_S
                    await self._talk(client)
            except (aiomqtt.MqttError, OSError, TimeoutError, ValueError) as exc:
                if str(exc) != self.last_error:
                    logger.warning("broker lost host=%s error=%s", self._broker.host, exc)
                self.last_error = str(exc)
            finally:
                self.is_connected = False
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_RETRY_S)

    def _client(self) -> aiomqtt.Client:
        broker = self._broker
        context = ssl.create_default_context(cafile=broker.ca_file) if broker.is_tls else None
        return aiomqtt.Client(
            broker.host,
            broker.port,
            username=broker.user,
            password=broker.password,
            tls_context=context,
            timeout=_ANSWER_TIMEOUT_S,
            keepalive=10,
            will=self._will,
        )


class MqttPublisher:
    """A publisher of a peer's events. `tell` may be called from any thread and returns at once.

    num_dropped: events that were dropped because the queue was full.
    """

    def __init__(self, broker: Broker, peer: str) -> None:
        offline = PeerStatus(peer=peer, is_online=False)
        topic, qos, _ = topic_of(offline, broker.topics, peer)
        will = aiomqtt.Will(topic, encode_event(offline), qos=qos, retain=True)
        self._connection = _Connection(broker, "mqtt-publisher", self._talk, will)
        self._topics = broker.topics
        self._peer = peer
        self._queue: deque[Event] = deque()
        self._arrived: asyncio.Event | None = None
        self.num_dropped = 0

    @property
    def is_connected(self) -> bool:
        """True while the broker accepts events."""
        return self._connection.is_connected

    def start(self) -> None:
        """Begin to connect."""
        self._connection.start()

    def close(self) -> None:
        """Report the peer offline and stop. Blocks for a moment, so call it in a worker thread."""
        self._connection.close()

    def tell(self, event: Event) -> None:
        """Queue an event, or drop it if the queue is full."""
        if len(self._queue) >= _MAX_QUEUED:
            self.num_dropped += 1
            return
        self._queue.append(event)
        if self._arrived is not None:
            self._connection.wake(self._arrived)

    async def _talk(self, client: aiomqtt.Client) -> None:
        self._arrived = asyncio.Event()
        try:
            while True:
                while self._queue:
                    # Dequeue only once the broker has it; after a lost connection it is sent again.
                    await self._publish(client, self._queue[0])
                    self._queue.popleft()
                self._arrived.clear()
                if not self._queue:
                    await self._arrived.wait()
        except asyncio.CancelledError:
            # After an orderly disconnect the broker does not send the will, so publish its content here.
            await self._publish(client, PeerStatus(peer=self._peer, is_online=False))
            raise

    async def _publish(self, client: aiomqtt.Client, event: Event) -> None:
        topic, qos, is_kept = topic_of(event, self._topics, self._peer)
        await client.publish(topic, encode_event(event), qos=qos, retain=is_kept, timeout=_ANSWER_TIMEOUT_S)


class MqttSubscriber:
    """A subscriber to all events of a swarm. heard: called with each event, in this object's thread."""

    def __init__(self, broker: Broker, heard: Callable[[Event], None]) -> None:
        self._connection = _Connection(broker, "mqtt-subscriber", self._talk)
        self._topics = broker.topics
        self._heard = heard

    @property
    def is_connected(self) -> bool:
        """True while events can arrive."""
        return self._connection.is_connected

    @property
    def last_error(self) -> str:
        """The last connection error; empty before the first."""
        return self._connection.last_error

    def start(self) -> None:
        """Begin to connect."""
        self._connection.start()

    def close(self) -> None:
        """Stop. Blocks for a moment, so call it in a worker thread."""
        self._connection.close()

    async def _talk(self, client: aiomqtt.Client) -> None:
        await client.subscribe(f"{self._topics}/peers/#", qos=1, timeout=_ANSWER_TIMEOUT_S)
        async for message in client.messages:
            payload = message.payload
            if not isinstance(payload, bytes) or len(payload) > _MAX_MESSAGE_BYTES:
                continue
            event = decode_event(payload)
            # A peer's events count only under its own topics, where the broker lets nobody else write.
            own = message.topic.value.removeprefix(f"{self._topics}/peers/").split("/")
            if event is not None and len(own) == 2 and own[0] == _author(event):
                self._heard(event)


def _author(event: Event) -> str:
    return event.peer if isinstance(event, PeerStatus) else event.coordinator
