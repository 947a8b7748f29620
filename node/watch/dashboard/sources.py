"""Gets the dashboard's events from a gateway's stream, a broker or a recording.

A gateway or a broker is read in a thread, which reconnects forever.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import httpx

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.events import Event, arrived, decode_event, encode_event, read_events
from dsd_p2p.telemetry.mqtt import Broker, MqttSubscriber

_MAX_WAITING = 100_000
_RETRY_S = 1.0
_SILENCE_S = 20.0


class Source(Protocol):
    """A source of events. `take` returns those that arrived since the last call."""

    name: str

    def take(self) -> list[Event]:
        """Return the new events."""
        ...

    @property
    def trouble(self) -> str:
        """Why no events arrive; empty when all is well."""
        ...

    @property
    def is_over(self) -> bool:
        """True when no more will come."""
        ...

    def now_s(self) -> float:
        """The time by the events' clock."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class GatewaySource:
    """The event stream of a gateway. Each connection starts with events for all that is running."""

    is_over = False

    def __init__(self, url: str, key: str = "") -> None:
        self.name = url
        self._url = url.rstrip("/") + "/v1/events"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._events: deque[Event] = deque(maxlen=_MAX_WAITING)
        self._trouble = "connecting"
        self._is_closed = False
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def trouble(self) -> str:
        """Why no events come."""
        return self._trouble

    def take(self) -> list[Event]:
        """Return the new events."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def now_s(self) -> float:
        """The time now."""
        return time.time()

    def close(self) -> None:
        """Stop."""
        self._is_closed = True

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._listen()
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                self._trouble = f"{type(exc).__name__}: trying again"
            time.sleep(_RETRY_S)

    def _listen(self) -> None:
        timeout = httpx.Timeout(_SILENCE_S, connect=5)
        with (
            httpx.Client(timeout=timeout, headers=self._headers) as client,
            client.stream("GET", self._url) as reply,
        ):
            if reply.status_code != 200:
                self._trouble = f"HTTP {reply.status_code}: trying again"
                return
            self._trouble = ""
            for line in reply.iter_lines():
                if self._is_closed:
                    return
                if line.startswith("data: ") and (event := decode_event(line[6:].encode())) is not None:
                    self._events.append(arrived(event, time.time()))
        self._trouble = "the gateway ended the stream: trying again"


class BrokerSource:
    """All events of a swarm, from its MQTT broker."""

    is_over = False

    def __init__(self, broker: Broker) -> None:
        self.name = f"mqtt://{broker.host}:{broker.port}"
        self._events: deque[Event] = deque(maxlen=_MAX_WAITING)
        self._subscriber = MqttSubscriber(broker, lambda event: self._events.append(arrived(event, time.time())))
        self._subscriber.start()

    @property
    def trouble(self) -> str:
        """Why no events come."""
        return "" if self._subscriber.is_connected else f"no broker: {self._subscriber.last_error or 'connecting'}"

    def take(self) -> list[Event]:
        """Return the new events."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def now_s(self) -> float:
        """The time now."""
        return time.time()

    def close(self) -> None:
        """Stop."""
        self._subscriber.close()


class Recorder:
    """A source that also writes its events to a file, one per line, for `dsd top --replay`."""

    def __init__(self, source: Source, file: Path) -> None:
        self._source = source
        self.name = source.name
        try:
            self._lines = file.open("ab")
        except OSError as exc:
            raise ConfigError(f"recording {file}: {exc.strerror}") from exc

    @property
    def trouble(self) -> str:
        """Why no events come."""
        return self._source.trouble

    @property
    def is_over(self) -> bool:
        """True when no more will come."""
        return self._source.is_over

    def take(self) -> list[Event]:
        """Write the new events to the file and return them."""
        events = self._source.take()
        self._lines.writelines(encode_event(event) + b"\n" for event in events)
        return events

    def now_s(self) -> float:
        """The time by the events' clock."""
        return self._source.now_s()

    def close(self) -> None:
        """Close the file and the source."""
        self._lines.close()
        self._source.close()


class Replay:
    """A recording of a live or simulated run, played `speed` times as fast.

    Raises:
        ConfigError: the file cannot be read or holds no events.
    """

    trouble = ""

    def __init__(self, file: Path, speed: float) -> None:
        self.name = f"{file.name} x{speed:g}"
        self._speed = speed
        try:
            self._lines = file.open("rb")
        except OSError as exc:
            raise ConfigError(f"recording {file}: {exc.strerror}") from exc
        self._events: Iterator[Event] = read_events(self._lines)
        self._next: Event | None = next(self._events, None)
        if self._next is None:
            raise ConfigError(f"recording {file}: the file contains no dsd events")
        self._first_s, self._started_s = self._next.at_s, time.monotonic()

    @property
    def is_over(self) -> bool:
        """True at the end of the recording."""
        return self._next is None

    def now_s(self) -> float:
        """The current time in the recording."""
        return self._first_s + (time.monotonic() - self._started_s) * self._speed

    def take(self) -> list[Event]:
        """Return the recording's events up to its current time."""
        events, now_s = [], self.now_s()
        while self._next is not None and self._next.at_s <= now_s:
            events.append(self._next)
            self._next = next(self._events, None)
        return events

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
