"""Batches the work of all sessions, continuously and fairly: a pass takes a window, or a piece of one, per session.

Work is a session's window (`.window_pass`) or a spot check's text (`.recompute`).

A pass starts as soon as the one before it is done, with the windows that wait at that moment. Coordinators take turns
by the number of rows that they want computed; the sessions of one coordinator are served in order of arrival. A long
prompt is computed in pieces, so that the other sessions wait only for one piece.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import PeerId, StageCost
from dsd_p2p.window.tracker import LineFit
from dsd_p2p.wire.messages import Message

_MAX_ROWS = 128
"""The most nodes in a pass: one chunk of a prompt (`GenerateOptions.prefill_chunk`), so a lone chunk is not cut."""

_MAX_SHARE = 32
"""The most nodes of one session in a pass while other sessions wait."""

_MAX_REMEMBERED = 1024
_MIN_PASSES = 20
"""Fewer passes say little about a machine that runs other programs too."""


Answer = tuple[Message, bytes]
"""The message to send on, and its payload."""

Cost = Callable[[], tuple[StageCost, float]]
"""Returns the cost of a piece of work at a stage, and the seconds that it waited there."""


class Work(Protocol):
    """Rows to run through the model, for one peer. Its methods run in a worker thread, in the order in which they stand.

    arrived_s: when it came. is_begun: whether `begin` was called.
    """

    arrived_s: float
    is_begun: bool

    @property
    def model(self) -> SpanModel:
        """The layers to run."""
        ...

    @property
    def num_layers(self) -> int:
        """Their number."""
        ...

    @property
    def owner(self) -> PeerId:
        """The peer for which it is done."""
        ...

    @property
    def num_left(self) -> int:
        """The number of rows still to compute; before `begin`, an upper bound."""
        ...

    @property
    def is_stale(self) -> bool:
        """True when nobody needs it any more."""
        ...

    def begin(self) -> None:
        """Get ready for the first piece.

        Raises:
            DsdError: the work is invalid.
        """
        ...

    def piece(self, max_rows: int) -> SpanPass:
        """Return the pass over the next rows."""
        ...

    def take(self, done: SpanPass, output: SpanOutput) -> None:
        """Take in the output of a piece.

        Raises:
            DsdError: the output is an error.
        """
        ...

    def finish(self, cost: Cost) -> Answer | None:
        """Return the message to send on, or None. cost: returns the cost up to the moment of the call."""
        ...


@dataclass(slots=True, eq=False)
class _Entry:
    work: Work
    number: int
    starts_at: int
    is_running: bool = False
    is_given_up: bool = False
    is_done: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None
    error: Exception | None = None
    seconds: float = 0.0
    num_rows: int = 0


class PassCosts:
    """The recent cost of one layer of this stage, measured in its passes."""

    def __init__(self) -> None:
        self._layer_cost = LineFit()
        self._num_passes = 0

    def note(self, num_layers: int, num_rows: int, seconds: float) -> None:
        """Add the measurement of one pass over `num_rows` rows."""
        self._layer_cost.add(num_rows, seconds / num_layers)
        self._num_passes += 1

    def layer_s(self) -> tuple[float, float] | None:
        """Return the seconds that one layer takes for 1 row and for 16 rows; None until enough passes were measured."""
        if self._num_passes < _MIN_PASSES:
            return None
        line = self._layer_cost.line()
        return line.at(1), line.at(16)


class Batcher:
    """The scheduler that runs the sessions' windows through the model.

    model_in_use: a lock, held during each pass. clock: returns the time in seconds.
    note_pass: called in the worker thread with the number of layers, the rows and the seconds of each pass.
    """

    def __init__(
        self, model_in_use: trio.Lock, clock: Callable[[], float], note_pass: Callable[[int, int, float], None]
    ) -> None:
        self.model_in_use = model_in_use
        self._clock = clock
        self._note_pass = note_pass
        self._waiting: list[_Entry] = []
        self._arrived = trio.Event()
        self._num_arrived = 0
        self._served_up_to = 0
        self._ends_at: OrderedDict[PeerId, int] = OrderedDict()
        self.num_passes = 0
        self.num_windows = 0
        self.busy_s = 0.0

    @property
    def num_waiting(self) -> int:
        """The number of windows that wait or are being computed."""
        return len(self._waiting)

    async def run(self, work: Work) -> Answer | None:
        """Do the work and return the message to send on, or None. Run a session's windows one after the other.

        If cancelled, it gives the work up and returns once no pass uses the session's cache.

        Raises:
            DsdError: the work is invalid.
            Exception: the model failed.
        """
        if work.is_stale:
            return None
        self._num_arrived += 1
        entry = _Entry(work, self._num_arrived, self._starts_at(work))
        self._waiting.append(entry)
        self._arrived.set()
        try:
            await entry.is_done.wait()
        except trio.Cancelled:
            entry.is_given_up = True
            if entry.is_running:
                with trio.CancelScope(shield=True):
                    await entry.is_done.wait()
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise
        if entry.error is not None:
            raise entry.error
        return entry.answer

    async def serve(self) -> None:
        """Run passes until cancelled."""
        while True:
            if not self._waiting:
                self._arrived = trio.Event()
                await self._arrived.wait()
            async with self.model_in_use:
                batch = self._choose()
                for entry, _ in batch:
                    entry.is_running = True
                # Shielded, because the cache of a cancelled session must not be freed during its pass.
                with trio.CancelScope(shield=True):
                    if batch:
                        await trio.to_thread.run_sync(self._run, batch)
                self._settle(batch)

    def _settle(self, batch: Sequence[tuple[_Entry, int]]) -> None:
        for entry, num_rows in batch:
            entry.is_running = False
            # Each further piece queues again.
            entry.starts_at += num_rows
            if entry.error is not None or entry.is_given_up or not entry.work.num_left:
                self._end(entry)

    def _end(self, entry: _Entry) -> None:
        self._waiting.remove(entry)
        entry.is_done.set()

    def _choose(self) -> list[tuple[_Entry, int]]:
        """Return the entries of the next pass, and how many rows each may compute."""
        for entry in [each for each in self._waiting if each.work.is_stale]:
            self._end(entry)
        if not self._waiting:
            return []
        order = sorted(self._waiting, key=lambda entry: (entry.starts_at, entry.number))
        model = order[0].work.model
        share = _MAX_ROWS if len(order) == 1 else _MAX_SHARE
        batch: list[tuple[_Entry, int]] = []
        num_left = _MAX_ROWS
        for entry in order:
            num_rows = min(entry.work.num_left, share, num_left)
            if entry.work.model is model and num_rows:
                batch.append((entry, num_rows))
                num_left -= num_rows
                self._served_up_to = max(self._served_up_to, entry.starts_at)
        return batch

    def _starts_at(self, work: Work) -> int:
        """Return a window's start tag in rows, by start-time fair queueing among coordinators (Goyal et al. 1996).

        A window starts after the coordinator's earlier ones. A coordinator does not accumulate credit while idle.
        """
        peer = work.owner
        starts_at = max(self._served_up_to, self._ends_at.get(peer, 0))
        self._ends_at[peer] = starts_at + work.num_left
        self._ends_at.move_to_end(peer)
        while len(self._ends_at) > _MAX_REMEMBERED:
            self._ends_at.popitem(last=False)
        return starts_at

    # In a worker thread

    def _run(self, batch: Sequence[tuple[_Entry, int]]) -> None:
        start_s = self._clock()
        pieces = [(entry, piece) for entry, num_rows in batch if (piece := _begin(entry, num_rows)) is not None]
        num_rows = sum(piece.num_rows for _, piece in pieces)
        if pieces:
            work = pieces[0][0].work
            outputs = _outputs([piece for _, piece in pieces], work.model)
            self._note_pass(work.num_layers, num_rows, self._clock() - start_s)
            for (entry, piece), output in zip(pieces, outputs, strict=True):
                try:
                    if isinstance(output, Exception):
                        raise output  # noqa: TRY301 - handled below with the entry's other errors
                    entry.work.take(piece, output)
                except Exception as exc:  # re-raised in `run`, where this session alone waits
                    entry.error = exc
        for entry, _ in batch:
            if entry.error is None and not entry.work.num_left:
                self._finish(entry, start_s, num_rows, len(pieces))
            entry.seconds += self._clock() - start_s
            entry.num_rows += num_rows
        self.num_passes += bool(pieces)
        self.num_windows += len(pieces)
        self.busy_s += self._clock() - start_s

    def _finish(self, entry: _Entry, start_s: float, num_rows: int, num_sessions: int) -> None:
        def cost() -> tuple[StageCost, float]:
            now_s = self._clock()
            seconds = entry.seconds + now_s - start_s
            computed = StageCost(
                us=max(0, round(seconds * 1e6)),
                num_rows=max(1, entry.num_rows + num_rows),
                num_sessions=max(1, num_sessions),
            )
            return computed, max(0.0, now_s - entry.work.arrived_s - seconds)

        try:
            entry.answer = entry.work.finish(cost)
        except Exception as exc:  # re-raised in `run`, where this session alone waits
            entry.error = exc


def _outputs(pieces: Sequence[SpanPass], model: SpanModel) -> Sequence[SpanOutput | Exception]:
    """Return each piece's output. If the whole pass fails, run the pieces singly, so that only the bad one fails."""
    try:
        return model.run(pieces)
    except Exception as exc:  # re-raised in `Batcher.run`, where the session waits
        if len(pieces) == 1:
            return [exc]
        return [_outputs([piece], model)[0] for piece in pieces]


def _begin(entry: _Entry, max_rows: int) -> SpanPass | None:
    """Return the pass over the entry's next rows; None if it has no rows left or failed."""
    work = entry.work
    try:
        if not work.is_begun:
            work.begin()
        return work.piece(max_rows) if work.num_left else None
    except Exception as exc:  # re-raised in `run`, where this session alone waits
        entry.error = exc
        return None
