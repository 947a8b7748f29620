"""Defines one session at one stage: its place in the route, the state it holds, and its phases.

How it works. The coordinator's `OpenSession` creates a session. `.task` runs it, and `.window_pass` computes its
windows.

    OPENING ──cache is there──> SERVING ──a neighbour is lost──> ORPHANED (waits for another route, `StageLimits.orphan_s`)
       │                           │                                │
       └───────────────────────────┴── end() ───────────────────────┘
                                   │
            HANDED_OVER  the next opening of the same session takes over what this one holds
            PARKED       the coordinator asked to park the text (`.parking`), and the session ended without error
            CLOSED       everything is freed

Threads. The event loop creates, ends and hands over sessions. While a pass runs (`.batcher`), only its worker thread
uses `held` and `tail`. The loop then calls only `held.state.is_stale`, which reads, and `held.state.cancel`, which sets
one number. No session is freed, handed over or parked during its pass, because `Batcher.run` returns only after the
pass, even if it is cancelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import CapacityError, DsdError
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.types import HiddenFormat, PeerId, Span, TokenId
from dsd_p2p.verification.base import VerifierSession
from dsd_p2p.wire.hidden import packed_row_bytes
from dsd_p2p.wire.messages import Hop, OpenSession, Park, Window, WindowAttestation


class Phase(Enum):
    """The phase of a session; the module docstring explains them."""

    OPENING = auto()
    SERVING = auto()
    ORPHANED = auto()
    HANDED_OVER = auto()
    PARKED = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This stage's place in a session's route.

    model: the part of our span that the route asks for.
    """

    opened: OpenSession
    index: int
    model: SpanModel

    @property
    def span(self) -> Span:
        """The layers that this stage runs."""
        return self.opened.route[self.index].span

    @property
    def coordinator(self) -> PeerId:
        """The peer that opened the session."""
        return PeerId(self.opened.coordinator.peer)

    @property
    def previous(self) -> PeerId:
        """The peer that sends us windows: the stage before us, or the coordinator."""
        return PeerId(self.opened.route[self.index - 1].peer) if self.index else self.coordinator

    @property
    def onward(self) -> Hop | None:
        """The stage after us; None at the tail."""
        return None if self.is_tail else self.opened.route[self.index + 1]

    @property
    def is_tail(self) -> bool:
        """True at the last stage of the route."""
        return self.index == len(self.opened.route) - 1

    @property
    def is_kept(self) -> bool:
        """True when we keep what we hold of the session from its earlier opening."""
        return bool(self.opened.kept) and self.opened.kept[self.index]

    @property
    def next_is_kept(self) -> bool:
        """True when the stage after us keeps what it holds."""
        return bool(self.opened.kept) and not self.is_tail and self.opened.kept[self.index + 1]

    @property
    def read_format(self) -> HiddenFormat:
        """The format of the hidden states that we receive."""
        return self.opened.formats[self.index - 1] if self.opened.formats and self.index else HiddenFormat.MODEL

    @property
    def write_format(self) -> HiddenFormat:
        """The format of the hidden states that we send."""
        return self.opened.formats[self.index] if self.opened.formats and not self.is_tail else HiddenFormat.MODEL

    @property
    def read_row_bytes(self) -> int:
        """The size in bytes of one node's hidden state as we receive it."""
        return packed_row_bytes(self.model.row_bytes, self.opened.model.compute, self.read_format)

    @property
    def written_row_bytes(self) -> int:
        """The size in bytes of one node's hidden state as we send it."""
        return packed_row_bytes(self.model.row_bytes, self.opened.model.compute, self.write_format)


class BoundaryLog:
    """The tokens and rows that a stage sent on, by cache slot: to refill the next stage if it is lost, and for audits.

    row_bytes: the size of one row: a hidden state as sent on the link, or the tail's probes.
    """

    def __init__(self, row_bytes: int) -> None:
        self._rows: NDArray[np.uint8] = np.empty((0, row_bytes), np.uint8)
        self._tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self.num_rows = 0

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return self._rows.nbytes + self._tokens.nbytes

    def edit(self, edit: CacheEdit) -> None:
        """Apply the edit that the cache applies."""
        self._rows[edit.num_kept : edit.num_slots] = self._rows[edit.gathered]
        self._tokens[edit.num_kept : edit.num_slots] = self._tokens[edit.gathered]
        self.num_rows = edit.num_slots

    def append(self, tokens: Sequence[TokenId], data: bytes) -> None:
        """Add the nodes of one window."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, self._rows.shape[1])
        end = self.num_rows + len(rows)
        if end > len(self._rows):
            num_slots = max(64, 2 * end)
            self._rows, self._tokens = _grown(self._rows, num_slots), _grown(self._tokens, num_slots)
        self._rows[self.num_rows : end] = rows
        self._tokens[self.num_rows : end] = tokens
        self.num_rows = end

    def rows(self, slots: slice | NDArray[np.int64]) -> bytes:
        """Return the rows of these slots."""
        return self._rows[slots].tobytes()

    def tokens(self, start: int, end: int) -> tuple[TokenId, ...]:
        """Return the tokens of these slots."""
        return tuple(self._tokens[start:end].tolist())


def _grown(array: NDArray[Any], num_slots: int) -> NDArray[Any]:
    grown = np.empty((num_slots, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(slots=True, kw_only=True)
class Held:
    """The state that a stage holds for a session and can hand over to its next opening.

    cache: None before the task has created it, and after it was handed over.
    log: None at the tail of a session that is not audited, in one with a prefix, and once refilling was given up.
    """

    state: StageState
    cache: SpanCache | None = None
    log: BoundaryLog | None = None

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots in the cache and in the log."""
        assert self.cache is not None
        self.cache.edit(edit)
        if self.log is not None:
            self.log.edit(edit)

    def resume(self, *, epoch: int, at: tuple[int, int], num_kept: int) -> None:
        """Go on in `epoch` with the first `num_kept` positions, which end at node `at`.

        Raises the errors of `StageState.resume`.
        """
        for edit in self.state.resume(epoch=epoch, at=at, num_kept=num_kept):
            self.edit(edit)

    def signed_rows(self, start: int, end: int, at: tuple[int, int]) -> tuple[bytes, int]:
        """Return the rows that were sent on for positions `start` to `end`, and their number. at: see `Reveal`."""
        slots = self.state.path_slots(at)[start:end]
        if self.log is None or (len(slots) and slots.max() >= self.log.num_rows):
            return b"", 0
        return self.log.rows(slots), len(slots)


@dataclass(slots=True, kw_only=True)
class Tail:
    """The state that only the tail has.

    attested: the route's attestations of the windows since the last verdict.
    """

    walk: TailWalk
    verifier: VerifierSession
    attested: list[WindowAttestation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Queued:
    """A waiting window with its payload. arrived_s: when it came."""

    window: Window
    payload: bytes
    arrived_s: float


class Inbox:
    """The windows that wait for the session's task, bounded in number and in bytes."""

    def __init__(self, max_windows: int, max_bytes: int) -> None:
        self._max_windows = max_windows
        self._max_bytes = max_bytes
        self._put, self.take = trio.open_memory_channel[Queued](max_windows)
        self._queued_bytes = 0
        self.received_bytes = 0

    def put(self, queued: Queued, frame_bytes: int) -> None:
        """Add a window. frame_bytes: the size of its whole frame.

        Raises:
            CapacityError: too many windows or bytes wait already.
        """
        self.received_bytes += frame_bytes
        self._queued_bytes += len(queued.payload)
        if self._queued_bytes > self._max_bytes:
            raise CapacityError(f"{self._queued_bytes} bytes of windows wait here: send them more slowly")
        try:
            self._put.send_nowait(queued)
        except trio.WouldBlock:
            raise CapacityError(f"{self._max_windows} windows wait here: send them more slowly") from None
        except trio.BrokenResourceError:
            # The task has ended and reports that to the coordinator.
            pass

    async def next(self) -> Queued:
        """Wait for the next window and return it."""
        queued = await self.take.receive()
        self._queued_bytes -= len(queued.payload)
        return queued


@dataclass(slots=True, kw_only=True, eq=False)
class StageSession:
    """One session at one stage; see the module docstring."""

    place: Place
    held: Held
    # None except at the tail.
    tail: Tail | None
    inbox: Inbox
    # The earlier session of this name. It must free or hand over its cache before this one starts.
    replaces: "StageSession | None" = None
    # True when the next opening keeps what we hold: the cache is handed over, not freed.
    has_heir: bool = False
    # The part of the text to park after the end, as given by the coordinator's close.
    park: Park | None = None
    # The rows that its coordinator was shown.
    num_revealed: int = 0
    # The error that ended it, and the neighbour that the error is about.
    error: DsdError | None = None
    about: str = ""
    phase: Phase = Phase.OPENING
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_over: trio.Event = field(default_factory=trio.Event)

    def __repr__(self) -> str:
        name, place = self.place.opened.session.hex(), self.place
        return (
            f"<session {name} {self.phase.name} layers {place.span} epoch {self.held.state.epoch}, "
            f"{self.held.state.num_settled} settled, from {place.previous}, error {self.error}>"
        )

    @property
    def coordinator(self) -> PeerId:
        """The peer that opened it."""
        return self.place.coordinator

    @property
    def opened(self) -> OpenSession:
        """The message that opened it."""
        return self.place.opened

    @property
    def is_orphan(self) -> bool:
        """True while it waits for another route."""
        return self.phase is Phase.ORPHANED

    def end(self, error: DsdError | None = None) -> None:
        """End the session; the coordinator receives `error`, if any."""
        self.error = self.error or error
        self.scope.cancel()
