"""One session at one stage: what does not change of it, what it holds, and how it ends.

How it works. The coordinator's `OpenSession` makes a session; `.task` runs it, `.window_pass` computes its windows.

    OPENING ──cache is there──> SERVING ──a neighbour is lost──> ORPHANED (waits for another route, `StageLimits.orphan_s`)
       │                           │                                │
       └───────────────────────────┴── end() ───────────────────────┘
                                   │
            HANDED_OVER  another opening of the same session goes on with what this one holds
            PARKED       the coordinator wants the text kept (`.parking`), and the session ended well
            CLOSED       everything is freed

Who may touch what. The event loop makes, ends and hands sessions over. While a pass runs (`.batcher`), its worker thread alone uses
`held` and `tail`; the loop only calls `held.state.is_stale`, which reads, and `held.state.cancel`, which sets one number. A session
is never freed, handed over or parked while a pass of it runs: `Batcher.run` returns only after it, also when it is cancelled.
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
    """See the module's text."""

    OPENING = auto()
    SERVING = auto()
    ORPHANED = auto()
    HANDED_OVER = auto()
    PARKED = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this stage stands in the session's route. model: the part of our span that the route asks for."""

    opened: OpenSession
    index: int
    model: SpanModel

    @property
    def span(self) -> Span:
        """The layers it runs."""
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
        """True when we go on with what we hold of the session."""
        return bool(self.opened.kept) and self.opened.kept[self.index]

    @property
    def next_is_kept(self) -> bool:
        """True when the stage after us goes on with what it holds."""
        return bool(self.opened.kept) and not self.is_tail and self.opened.kept[self.index + 1]

    @property
    def read_format(self) -> HiddenFormat:
        """Format of the hidden states that we receive."""
        return self.opened.formats[self.index - 1] if self.opened.formats and self.index else HiddenFormat.MODEL

    @property
    def write_format(self) -> HiddenFormat:
        """Format of the hidden states that we send."""
        return self.opened.formats[self.index] if self.opened.formats and not self.is_tail else HiddenFormat.MODEL

    @property
    def read_row_bytes(self) -> int:
        """Bytes of one node's hidden state as we receive it."""
        return packed_row_bytes(self.model.row_bytes, self.opened.model.compute, self.read_format)

    @property
    def written_row_bytes(self) -> int:
        """Bytes of one node's hidden state as we send it."""
        return packed_row_bytes(self.model.row_bytes, self.opened.model.compute, self.write_format)


class BoundaryLog:
    """The tokens and hidden states a stage has sent on, by cache slot: they refill the stage after it when that one is lost.

    row_bytes: of one node, as sent on the link.
    """

    def __init__(self, row_bytes: int) -> None:
        self._rows: NDArray[np.uint8] = np.empty((0, row_bytes), np.uint8)
        self._tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self.num_rows = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._rows.nbytes + self._tokens.nbytes

    def edit(self, edit: CacheEdit) -> None:
        """Do what the cache does."""
        self._rows[edit.num_kept : edit.num_slots] = self._rows[edit.gathered]
        self._tokens[edit.num_kept : edit.num_slots] = self._tokens[edit.gathered]
        self.num_rows = edit.num_slots

    def append(self, tokens: Sequence[TokenId], data: bytes) -> None:
        """Take in the nodes of one window."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, self._rows.shape[1])
        end = self.num_rows + len(rows)
        if end > len(self._rows):
            num_slots = max(64, 2 * end)
            self._rows, self._tokens = _grown(self._rows, num_slots), _grown(self._tokens, num_slots)
        self._rows[self.num_rows : end] = rows
        self._tokens[self.num_rows : end] = tokens
        self.num_rows = end

    def rows(self, start: int, end: int) -> bytes:
        """Return the rows of these slots."""
        return self._rows[start:end].tobytes()

    def tokens(self, start: int, end: int) -> tuple[TokenId, ...]:
        """Return the tokens of these slots."""
        return tuple(self._tokens[start:end].tolist())


def _grown(array: NDArray[Any], num_slots: int) -> NDArray[Any]:
    grown = np.empty((num_slots, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(slots=True, kw_only=True)
class Held:
    """What a stage holds of a session, and hands over to the next opening of it.

    cache: None before the task has one, and after it was handed over. log: None at the tail, and where a refill was given up.
    """

    state: StageState
    cache: SpanCache | None = None
    log: BoundaryLog | None = None

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots, of the cache and of what is kept for a refill."""
        assert self.cache is not None
        self.cache.edit(edit)
        if self.log is not None:
            self.log.edit(edit)

    def resume(self, *, epoch: int, at: tuple[int, int], num_kept: int) -> None:
        """Go on in `epoch` with the first `num_kept` positions, which end at node `at`; raises as `StageState.resume` does."""
        for edit in self.state.resume(epoch=epoch, at=at, num_kept=num_kept):
            self.edit(edit)

    def settled_rows(self, end: int) -> tuple[bytes, int]:
        """Return the hidden states sent on for the committed positions below `end`, and how many there are."""
        if self.log is None:
            return b"", 0
        num_rows = min(end, self.state.num_settled, self.log.num_rows)
        return self.log.rows(0, num_rows), num_rows


@dataclass(slots=True, kw_only=True)
class Tail:
    """What only the last stage has. attested: what the route signed of the windows since the last verdict."""

    walk: TailWalk
    verifier: VerifierSession
    attested: list[WindowAttestation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Queued:
    """A window and its payload that wait; arrived_s: when they came."""

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
        """Take in a window. frame_bytes: of its whole frame.

        Raises:
            CapacityError: too much waits.
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
            # The task has ended; the coordinator learns that from it.
            pass

    async def next(self) -> Queued:
        """Return the next window, once there is one."""
        queued = await self.take.receive()
        self._queued_bytes -= len(queued.payload)
        return queued


@dataclass(slots=True, kw_only=True, eq=False)
class StageSession:
    """One session at one stage; see the module's text."""

    place: Place
    held: Held
    # None but at the tail.
    tail: Tail | None
    inbox: Inbox
    # The session of this name before it: its cache must be free, or handed over, before this one starts.
    replaces: "StageSession | None" = None
    # The opening after this one goes on with what we hold: it is handed over, not freed.
    has_heir: bool = False
    # What of the text to hold after the end; told by the coordinator's close.
    park: Park | None = None
    # What ended it, and which neighbour that is about.
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
        """What opened it."""
        return self.place.opened

    @property
    def is_orphan(self) -> bool:
        """True while it waits for another route."""
        return self.phase is Phase.ORPHANED

    def end(self, error: DsdError | None = None) -> None:
        """End it; `error` is reported to the coordinator."""
        self.error = self.error or error
        self.scope.cancel()
