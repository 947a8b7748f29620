"""What one stage holds of one session."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import DsdError
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.types import PeerId, TokenId
from dsd_p2p.verification.base import VerifierSession
from dsd_p2p.wire.hidden import HiddenFormat
from dsd_p2p.wire.messages import Hop, OpenSession, Park, Window, WindowAttestation


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


@dataclass(frozen=True, slots=True)
class Queued:
    """A window and its payload that wait; arrived_s: when they came."""

    window: Window
    payload: bytes
    arrived_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class StageSession:
    """One session at one stage.

    index: of this stage in the route. model: the part of the span that the route asks for.
    replaces: the session of this name before it, whose cache must be free, or handed over, before this one starts.
    is_kept: goes on with what `replaces` holds. heir_waits: our own cache is handed over, not freed.
    is_orphan: a neighbour is gone and the coordinator knows; what is held waits a while for another route.
    error, about: what ended it, and which neighbour that is about.
    attested: at the tail, what the chain signed of the windows since the last verdict.
    park: what of the text to hold after the end.
    """

    opened: OpenSession
    index: int
    model: SpanModel
    previous: PeerId
    onward: Hop | None
    state: StageState
    walk: TailWalk | None
    verifier: VerifierSession | None
    read_format: HiddenFormat
    write_format: HiddenFormat
    row_bytes: int
    max_slots: int
    replaces: "StageSession | None"
    is_kept: bool
    put: trio.MemorySendChannel[Queued]
    take: trio.MemoryReceiveChannel[Queued]
    cache: SpanCache | None = None
    log: BoundaryLog | None = None
    received_bytes: int = 0
    queued_bytes: int = 0
    attested: list[WindowAttestation] = field(default_factory=list)
    heir_waits: bool = False
    is_orphan: bool = False
    is_over: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    park: Park | None = None
    error: DsdError | None = None
    about: str = ""

    @property
    def coordinator(self) -> PeerId:
        """Who opened it."""
        return PeerId(self.opened.coordinator.peer)

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots, of the cache and of what is kept for a refill."""
        assert self.cache is not None
        self.cache.edit(edit)
        if self.log is not None:
            self.log.edit(edit)

    def settled_rows(self, end: int) -> tuple[bytes, int]:
        """Return the hidden states sent on for the committed positions below `end`, and how many there are."""
        if self.log is None:
            return b"", 0
        num_rows = min(end, self.state.num_settled, self.log.num_rows)
        return self.log.rows(0, num_rows), num_rows

    def end(self, error: DsdError | None = None) -> None:
        """End it; `error` is told to the coordinator."""
        self.error = self.error or error
        self.scope.cancel()
