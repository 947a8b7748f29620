"""Keeps the table that says which slot of a KV cache holds which node.

Slot `i < prefix_length` holds the committed token at position `i`. The slots after the prefix hold the speculative
nodes in arrival order, so a parent always comes before its children. Stages and the model drafter both use this table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import LocalProtocolError, RemoteProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEdit:
    """A change to a cache before its next forward pass: keep the first `num_kept` slots, then append `gathered`.

    gathered: absolute slots, int64 `[m]`, ascending, all `>= num_kept`; empty for a plain truncation.
    """

    num_kept: int
    gathered: NDArray[np.int64]

    @property
    def num_slots(self) -> int:
        """Slots in use after the change."""
        return self.num_kept + len(self.gathered)

    def check(self, num_filled: int) -> None:
        """Check the change against a cache whose first `num_filled` slots are filled.

        Raises:
            LocalProtocolError: some of the slots to keep are not.
        """
        num_needed = int(self.gathered[-1]) + 1 if len(self.gathered) else self.num_kept
        if num_needed > num_filled:
            raise LocalProtocolError(f"cannot keep {self.num_slots} slots: only {num_filled} are filled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One pass of `n` new nodes over a cache of `num_slots` slots, the new ones included.

    positions: int64 `[n]`.
    slot_positions: int64 `[num_slots]`, the position of each slot's token.
    mask: bool `[n, num_slots]`, True where a node attends: to the committed prefix, to its ancestors and to itself.
    num_settled: how many of the first slots hold text that is never taken back, except its last token.
    """

    positions: NDArray[np.int64]
    slot_positions: NDArray[np.int64]
    mask: NDArray[np.bool_]
    num_settled: int = 0

    def part(self, start: int, end: int) -> "Forward":
        """Return the pass over nodes `[start, end)` alone; the nodes before them must already be in the cache."""
        if (start, end) == (0, len(self.positions)):
            return self
        num_slots = len(self.slot_positions) - len(self.positions) + end
        return Forward(
            positions=self.positions[start:end],
            slot_positions=self.slot_positions[:num_slots],
            mask=self.mask[start:end, :num_slots],
            num_settled=min(self.num_settled, num_slots),
        )


class SlotTable:
    """The slots of one session's cache. Each node is named by an integer that is used only once."""

    def __init__(self, prefix_length: int = 0) -> None:
        self.prefix_length = prefix_length
        self._nodes: dict[int, int] = {}
        self._positions = np.empty(0, np.int64)
        self._attends = np.empty((0, 0), np.bool_)

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return self.prefix_length + len(self._positions)

    def chain(self, num_nodes: int) -> "Forward":
        """Put nodes 0, 1, … into an empty table, each a child of the one before, and return their pass.

        They are a text that stays, though the caller has not settled it yet.
        """
        assert self.num_slots == 0, "a chain starts a text"
        forward = self.append(range(num_nodes), [None, *range(num_nodes - 1)], range(num_nodes))
        return replace(forward, num_settled=num_nodes)

    def __contains__(self, node: int) -> bool:
        return node in self._nodes

    def path(self, node: int) -> NDArray[np.int64]:
        """Return the slots of the prefix and of the path to `node`, int64 `[num positions]`."""
        path = np.flatnonzero(self._attends[self._nodes[node]])
        return np.concatenate([np.arange(self.prefix_length), self.prefix_length + path])

    def settle(self, node: int | None) -> CacheEdit | None:
        """Add the path to `node` to the prefix, and keep only its descendants; `None` keeps only the prefix.

        Return the change that the cache needs, or None if it needs none.
        """
        if node is None:
            keep = np.empty(0, np.int64)
            num_joined = 0
        else:
            index = self._nodes[node]
            path = np.flatnonzero(self._attends[index])
            descendants = np.flatnonzero(self._attends[:, index])
            keep = np.concatenate([path, descendants[descendants != index]])
            num_joined = len(path)
        num_before = len(self._positions)
        first_slot = self.prefix_length
        self.prefix_length += num_joined
        kept_speculative = keep[num_joined:]
        new_index = {old: new for new, old in enumerate(kept_speculative.tolist())}
        self._nodes = {name: new_index[old] for name, old in self._nodes.items() if old in new_index}
        self._positions = self._positions[kept_speculative]
        self._attends = self._attends[np.ix_(kept_speculative, kept_speculative)]
        in_place = int(np.argmin(np.append(keep == np.arange(len(keep)), False)))
        if in_place == len(keep) == num_before:
            return None
        return CacheEdit(num_kept=first_slot + in_place, gathered=first_slot + keep[in_place:])

    def rewind(self, length: int) -> CacheEdit:
        """Shorten the committed prefix to `length`; the table must hold no speculative nodes."""
        assert length <= self.prefix_length == self.num_slots
        self.prefix_length = length
        return CacheEdit(num_kept=length, gathered=np.empty(0, np.int64))

    def append(self, nodes: Sequence[int], parents: Sequence[int | None], positions: Sequence[int]) -> Forward:
        """Give each node the next slot and return the pass that fills them.

        parents: for each node, one of the table or an earlier one of this call; None for a child of the prefix's end.

        Raises:
            RemoteProtocolError: a parent is unknown, a name is used twice, or a position is not its parent's plus one.
        """
        num_old, num_new = len(self._positions), len(nodes)
        num_all = num_old + num_new
        attends = np.zeros((num_all, num_all), np.bool_)
        attends[:num_old, :num_old] = self._attends
        index_of = dict(self._nodes)
        all_positions = np.append(self._positions, np.asarray(positions, np.int64))
        for offset, (node, parent) in enumerate(zip(nodes, parents, strict=True)):
            index = num_old + offset
            if node in index_of:
                raise RemoteProtocolError("node", node, "a number not used before")
            if parent is None:
                expected_position = self.prefix_length
            else:
                parent_index = index_of.get(parent)
                if parent_index is None:
                    raise RemoteProtocolError("parent", parent, "a node that descends from the root")
                attends[index] = attends[parent_index]
                expected_position = int(all_positions[parent_index]) + 1
            if positions[offset] != expected_position:
                raise RemoteProtocolError("position", positions[offset], f"{expected_position}, its parent's plus one")
            attends[index, index] = True
            index_of[node] = index
        self._nodes, self._positions, self._attends = index_of, all_positions, attends
        return Forward(
            positions=all_positions[num_old:],
            slot_positions=np.concatenate([np.arange(self.prefix_length), all_positions]),
            mask=np.concatenate([np.ones((num_new, self.prefix_length), np.bool_), attends[num_old:]], axis=1),
            num_settled=self.prefix_length,
        )
