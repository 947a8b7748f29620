"""Adds a process's events up to a picture, and passes them on to whoever listens."""

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
