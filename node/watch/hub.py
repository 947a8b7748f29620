"""Adds events up to a picture of the swarm and passes them on to listeners."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import trio

from dsd_p2p.telemetry.events import Event, SessionStarted, WindowVerified
from dsd_p2p.telemetry.picture import Picture

_MAX_LISTENERS = 64
_QUEUED_EVENTS = 1024
_MAX_SPEAKING = 4096


class EventHub:
    """Adds events up to a picture and passes them on. For use in one trio loop.

    speaking: peers that report themselves.
    """

    def __init__(self) -> None:
        self.picture = Picture()
        self._listeners: set[trio.MemorySendChannel[Event]] = set()
        self._sinks: list[Callable[[Event], None]] = []
        self.speaking: set[str] = set()

    def pass_on_to(self, sink: Callable[[Event], None]) -> None:
        """From now on, pass this process's own events to `sink`."""
        self._sinks.append(sink)

    def tick(self) -> None:
        """Advance the picture's clock, so that it forgets what is over."""
        self.picture.tick(time.time())

    def tell(self, event: Event) -> None:
        """Add an event of this process and pass it to listeners and sinks."""
        self.hear(event)
        for sink in self._sinks:
            sink(event)

    def hear_from(self, author: str, event: Event) -> None:
        """Add an event that another peer reports about itself."""
        if len(self.speaking) < _MAX_SPEAKING:
            self.speaking.add(author)
        self.hear(event)

    def hear(self, event: Event) -> None:
        """Add an event of any origin and pass it to listeners."""
        self.picture.add(event)
        for listener in self._listeners:
            # A listener that does not keep up misses some events. Later events carry totals, which make up for it.
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                listener.send_nowait(event)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[tuple[list[Event], trio.MemoryReceiveChannel[Event]] | None]:
        """Yield events that add up to the current picture, and a channel of new ones; None if too many listen."""
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
    """Return events that add up to the peers and running requests of a picture."""
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
