"""Stores what the recurrent layers of a session keep: a state after the folded text, and a row for each waiting slot.

How it works. A recurrent layer reads the text before a node from a state. A state for each node of a tree would be
large, and taking nodes back would mean to restore one. So a session keeps one state for each layer, the one after its
first `num_folded` positions. Each later slot has a small row: what the recurrence writes at that node
(`dsd_p2p.models.recurrent.linear`). Rows are gathered and dropped like keys and values. When the settled text has
grown, `fold` takes its rows into the state.

    folded text ──────────┐ waiting slots: settled, then speculative
    state, inputs of the  │ rows
    last K - 1 positions  │
                          └── one settled position always waits: a resumed session may take it back

A pass writes rows behind the slots in use, so one that fails half-way changes nothing. States are never changed in
place, so copies and snapshots share them. What may be taken back: docs/protocol.md, rule 9: Replay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import CapacityError, PrefixLost
from dsd_p2p.models.cache import CacheBudget

_LAG = 1
"""Settled positions that are not folded yet."""

_MIN_ROWS = 64
"""Slots for which a layer allocates rows at first."""

FoldState = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""Returns the state after some rows, `[count, ...]` each by name."""


@dataclass(slots=True, kw_only=True, eq=False)
class LayerMemory:
    """What one recurrent layer keeps of one session.

    budget: where its memory comes from. rows: buffers `[capacity, ...]` by name.
    tail: the convolution's inputs at the last folded positions, `[K - 1, channels]`. state: float32, its shape is the
    scan's. Both are None before the first pass. fold: how the scan folds rows; None for a layer without a state.
    """

    budget: CacheBudget
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    tail: torch.Tensor | None = None
    state: torch.Tensor | None = None
    fold: FoldState | None = None

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        fixed = sum(each.nbytes for each in (self.tail, self.state) if each is not None)
        return fixed + sum(each.nbytes for each in self.rows.values())

    def start_tail(self, like: torch.Tensor, width: int) -> torch.Tensor:
        """Return the convolution's inputs before the waiting slots: zeros before the first fold.

        like: a tensor `[n, channels]`. width: the convolution's.
        """
        if self.tail is None:
            self.tail = self._new(like, (width - 1, like.shape[1]))
        return self.tail

    def start_state(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the state before the waiting slots: zeros before the first fold. like: a float32 tensor."""
        if self.state is None:
            self.state = self._new(like, shape)
        return self.state

    def write(self, name: str, rows: torch.Tensor, at: int) -> torch.Tensor:
        """Write the rows `[n, ...]` of the slots from `at` on; return all rows up to there.

        Raises:
            CapacityError: the budget has no room for more.
        """
        end = at + len(rows)
        buffer = self.rows.get(name)
        if buffer is None or end > len(buffer):
            old = buffer
            buffer = self._new(rows, (max(_MIN_ROWS, 2 * end), *rows.shape[1:]))
            if old is not None:
                buffer[:at] = old[:at]
                self.budget.release(old.nbytes)
            self.rows[name] = buffer
        buffer[at:end] = rows
        return buffer[:end]

    def folded(self, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return state and tail after `count` more positions."""
        state, tail = self.state, self.tail
        rows = {name: buffer[:count] for name, buffer in self.rows.items()}
        if state is not None and self.fold is not None:
            state = self.fold(state, rows)
        if tail is not None:
            tail = torch.cat([tail, rows["conv"]])[-len(tail) :].clone() if len(tail) else tail
        return state, tail

    def move(self, num_kept: int, gathered: torch.Tensor) -> None:
        """Keep the first rows and move the gathered ones after them."""
        for buffer in self.rows.values():
            # Indexing makes a copy, so source and destination may overlap.
            buffer[num_kept : num_kept + len(gathered)] = buffer[gathered.to(buffer.device)]

    def shrink(self, num_rows: int) -> None:
        """Give unused rows back."""
        for name, buffer in self.rows.items():
            self.rows[name] = buffer[:num_rows].clone()
            self.budget.release(buffer.nbytes - self.rows[name].nbytes)

    def copy(self, other: "LayerMemory", num_rows: int) -> None:
        """Take over the state and the first rows of another session's layer."""
        self.fold = other.fold
        self.hold(other.state, other.tail)
        for name, buffer in other.rows.items():
            self.write(name, buffer[:num_rows], 0)

    def hold(self, state: torch.Tensor | None, tail: torch.Tensor | None) -> None:
        """Start from a state and a tail that another session has made."""
        self.budget.reserve(sum(each.nbytes for each in (state, tail) if each is not None))
        self.state, self.tail = state, tail

    def free(self) -> None:
        """Give everything back to the budget. A second call does nothing."""
        self.budget.release(self.num_bytes)
        self.rows, self.state, self.tail = {}, None, None

    def _new(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        self.budget.reserve(int(np.prod(shape)) * like.element_size())
        return like.new_zeros(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """State and tail of every layer after the first `num_folded` positions."""

    num_folded: int
    layers: Mapping[int, tuple[torch.Tensor | None, torch.Tensor | None]]
    num_bytes: int


class RecurrentMemory:
    """What all recurrent layers of one session keep.

    mark: a length at which a copy will often be cut, such as the prompt's: a state cannot be cut, so the one at the
    mark is kept as a snapshot. 0 for none.
    """

    def __init__(self, budget: CacheBudget, mark: int = 0) -> None:
        self._budget = budget
        self._mark = mark
        self._layers: dict[int, LayerMemory] = {}
        self._snapshot: _Snapshot | None = None
        self.num_folded = 0

    def layer(self, index: int) -> LayerMemory:
        """Return what the layer keeps."""
        if index not in self._layers:
            self._layers[index] = LayerMemory(budget=self._budget)
        return self._layers[index]

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        snapshot = self._snapshot.num_bytes if self._snapshot else 0
        return snapshot + sum(layer.num_bytes for layer in self._layers.values())

    def fold(self, num_settled: int, num_slots: int) -> None:
        """Take into the states what is settled. num_settled, num_slots: positions settled, and slots in use."""
        target = min(num_settled - _LAG, num_slots)
        if self.num_folded < self._mark <= target:
            self._fold_to(self._mark, num_slots)
            self._keep_snapshot()
        if target > self.num_folded:
            self._fold_to(target, num_slots)

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots.

        Raises:
            PrefixLost: some of the slots to keep are folded together with later ones.
        """
        if edit.num_kept < self.num_folded:
            raise PrefixLost(
                f"recurrent layers cannot go back to {edit.num_kept} tokens: their state has {self.num_folded}"
            )
        if len(edit.gathered):
            gathered = torch.from_numpy(edit.gathered - self.num_folded)
            for layer in self._layers.values():
                layer.move(edit.num_kept - self.num_folded, gathered)

    def copy(self, other: "RecurrentMemory", num_slots: int) -> None:
        """Take over the first slots of another session.

        Raises:
            PrefixLost: the other has no state for a text of this length.
        """
        snapshot = other._snapshot
        if num_slots >= other.num_folded:
            for index, layer in other._layers.items():
                self.layer(index).copy(layer, num_slots - other.num_folded)
            self.num_folded = other.num_folded
        elif snapshot is not None and snapshot.num_folded == num_slots:
            for index, (state, tail) in snapshot.layers.items():
                self.layer(index).fold = other._layers[index].fold
                self.layer(index).hold(state, tail)
            self.num_folded = num_slots
        else:
            raise PrefixLost(f"recurrent layers have no state after {num_slots} tokens of this text")

    def shrink(self, num_slots: int) -> None:
        """Give unused rows back. num_slots: those in use."""
        for layer in self._layers.values():
            layer.shrink(num_slots - self.num_folded)

    def free(self) -> None:
        """Give the memory back to the budget. A second call does nothing."""
        for layer in self._layers.values():
            layer.free()
        if self._snapshot is not None:
            self._budget.release(self._snapshot.num_bytes)
            self._snapshot = None

    def _fold_to(self, num_folded: int, num_slots: int) -> None:
        count = num_folded - self.num_folded
        # All states are made before any is replaced, so that a failure leaves the layers together.
        folded = {index: layer.folded(count) for index, layer in self._layers.items()}
        for index, layer in self._layers.items():
            layer.state, layer.tail = folded[index]
            layer.move(0, torch.arange(count, num_slots - self.num_folded))
        self.num_folded = num_folded

    def _keep_snapshot(self) -> None:
        layers = {index: (layer.state, layer.tail) for index, layer in self._layers.items()}
        num_bytes = sum(each.nbytes for pair in layers.values() for each in pair if each is not None)
        try:
            self._budget.reserve(num_bytes)
        except CapacityError:
            return  # A text without a snapshot is only computed again.
        self._snapshot = _Snapshot(num_folded=self.num_folded, layers=layers, num_bytes=num_bytes)
