"""Says how the paths of a pass's nodes run through the slots that wait, for all recurrent layers of the pass."""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray


class Paths:
    """The paths of `n` new nodes through `s` waiting slots, those of the new nodes last.

    A waiting slot is one that is not folded into the session's state. A parent's slot comes before its children's.
    attends: bool `[n, s]`, True on a node's path, itself included.
    """

    def __init__(self, attends: NDArray[np.bool_], device: str) -> None:
        self._attends = attends
        self._device = device
        self._last: dict[int, torch.Tensor] = {}
        self.attends = torch.from_numpy(attends).to(device)

    @property
    def num_new(self) -> int:
        """The number of new nodes."""
        return int(self._attends.shape[0])

    @property
    def num_old(self) -> int:
        """The number of slots that waited before."""
        return int(self._attends.shape[1]) - self.num_new

    def last(self, count: int) -> torch.Tensor:
        """Return the last `count` slots of each path, int64 `[n, count]`.

        Slot `i` is numbered `count + i`; the numbers below `count` are those of the folded slots just before.
        """
        if count not in self._last:
            backwards = self._attends[:, ::-1].cumsum(axis=1)
            length = backwards[:, -1]
            found = np.empty((self.num_new, count), np.int64)
            for back in range(count):
                at = self._attends.shape[1] - 1 - (backwards > back).argmax(axis=1)
                found[:, count - 1 - back] = np.where(length > back, count + at, count + length - back - 1)
            self._last[count] = torch.from_numpy(found).to(self._device)
        return self._last[count]

    def all_see(self, start: int, end: int, first: int) -> bool:
        """Return whether the new nodes `[start, end)` have all slots from `first` to that of node `start` on their path."""
        return bool(self._attends[start:end, first : self.num_old + start].all())

    @cached_property
    def levels(self) -> list[tuple[list[int], list[int]]]:
        """The slots of all paths by depth: the slots of one depth, and the place of each one's parent.

        The place is an index into the depth before; 0 at the first depth, where the parent is the folded text.
        """
        parents: dict[int, int] = {}
        for row in self._attends:
            path = np.flatnonzero(row).tolist()
            parents.update(zip(path, [-1, *path[:-1]], strict=True))
        depths: dict[int, int] = {-1: -1}
        levels: list[list[int]] = []
        for slot in sorted(parents):
            depths[slot] = depths[parents[slot]] + 1
            if depths[slot] == len(levels):
                levels.append([])
            levels[depths[slot]].append(slot)
        found = []
        for level, before in zip(levels, [[-1], *levels], strict=False):
            place = {slot: index for index, slot in enumerate(before)}
            found.append((level, [place[parents[slot]] for slot in level]))
        return found
