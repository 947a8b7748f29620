"""Stores the keys and values of all sessions of a GPU stage in buffers that they share, slot by slot.

How it works. A graph remembers addresses, so sessions cannot have buffers of their own. Each session owns slots of one
arena and keeps their numbers in the order of its text. A pass gets the numbers as inputs. Keeping and moving a session's
slots then changes numbers only. Slot 0 belongs to no session: rows and slots that only fill a bucket use it.
"""

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import CapacityError, PrefixLost
from dsd_p2p.models.cache import CacheBudget

_FEWEST_SLOTS = 2048


class Arena:
    """The buffers of a span's layers. They grow with the sessions, up to `max_slots`.

    generation: changes when buffers move, after which older graphs must not run. in_use: held by whoever uses the buffers;
    taking and giving back numbers needs no buffers and waits for nobody.
    """

    def __init__(self, max_slots: int) -> None:
        self.generation = 0
        self.in_use = threading.RLock()
        self._numbers = threading.Lock()
        self._max_slots = max_slots
        self._num_slots = 1
        self._free = np.empty(0, np.int64)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, num_slots: int) -> NDArray[np.int64]:
        """Return the numbers of free slots, which are the caller's from now on.

        Raises:
            CapacityError: there are not so many.
        """
        with self._numbers:
            missing = num_slots - len(self._free)
            if missing > self._max_slots - self._num_slots:
                raise CapacityError(f"{num_slots} slots of cache are needed, {len(self._free)} are free: wait")
            if missing > 0:
                room = self._max_slots - self._num_slots
                end = self._num_slots + min(room, max(missing, self._num_slots, _FEWEST_SLOTS))
                self._free = np.concatenate([self._free, np.arange(self._num_slots, end)])
                self._num_slots = end
            taken, self._free = self._free[:num_slots], self._free[num_slots:]
            return taken

    def give_back(self, slots: NDArray[np.int64]) -> None:
        """Take slots back."""
        with self._numbers:
            self._free = np.concatenate([self._free, slots])

    @torch.inference_mode()
    def settle(self) -> None:
        """Make the buffers as large as the numbers that were taken. The caller holds `in_use`.

        If there is no memory for them, nothing has changed.
        """
        grown: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, pair in self._layers.items():
            if pair[0].shape[1] < self._num_slots:
                grown[layer] = (self._larger(pair[0]), self._larger(pair[1]))
        if grown:
            self._layers.update(grown)
            self.generation += 1

    def buffers(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, `[heads, slots, head_dim]`. keys, values: tensors like those to store."""
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = (self._like(keys[0]), self._like(values[0]))
        return held

    @torch.inference_mode()
    def copy(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy what some slots hold to others."""
        with self.in_use:
            self._copy(source, target)

    def _copy(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        self.settle()
        for buffer in (each for pair in self._layers.values() for each in pair):
            here, there = (torch.from_numpy(each).to(buffer.device) for each in (source, target))
            buffer.index_copy_(1, there, buffer.index_select(1, here))

    def _larger(self, old: Tensor) -> Tensor:
        new = self._like(old)
        new[:, : old.shape[1]] = old
        return new

    def _like(self, tensor: Tensor) -> Tensor:
        # Slots that nobody filled are multiplied by zero, so they must be numbers.
        return tensor.new_zeros(tensor.shape[0], self._num_slots, tensor.shape[2])


class ArenaCache:
    """The slots of one session. The first `num_slots` are in use; `num_bytes` of the budget are reserved."""

    def __init__(self, arena: Arena, max_slots: int, slot_bytes: int, budget: CacheBudget) -> None:
        self.num_bytes = max_slots * slot_bytes
        budget.reserve(self.num_bytes)
        self._budget, self._slot_bytes, self._arena = budget, slot_bytes, arena
        try:
            self._slots = arena.take(max_slots)
        except CapacityError:
            budget.release(self.num_bytes)
            raise
        self.num_slots = 0

    def slots(self, num_new: int) -> NDArray[np.int64]:
        """Return the numbers of the slots in use and of the next `num_new`."""
        return self._slots[: self.num_slots + num_new]

    def grow(self, num_nodes: int) -> None:
        """Mark `num_nodes` more slots as used."""
        self.num_slots += num_nodes

    def edit(self, edit: CacheEdit) -> None:
        """Keep the first slots and the gathered ones after them.

        Raises:
            LocalProtocolError: some of these slots were never filled.
        """
        edit.check(self.num_slots)
        is_kept = np.zeros(len(self._slots), np.bool_)
        is_kept[: edit.num_kept] = True
        is_kept[edit.gathered] = True
        self._slots = np.concatenate([self._slots[is_kept], self._slots[~is_kept]])
        self.num_slots = edit.num_slots

    def copy(self, other: "ArenaCache", num_slots: int) -> None:
        """Copy the first slots of another session's cache for the same layers into this one, which must be empty.

        Raises:
            PrefixLost: the other cache holds fewer.
        """
        if other.num_slots < num_slots:
            raise PrefixLost(f"{num_slots} tokens were requested, but only {other.num_slots} are parked here")
        self._arena.copy(other._slots[:num_slots], self._slots[:num_slots])
        self.num_slots = num_slots

    def shrink(self) -> None:
        """Give the unused slots back. Nothing can be added afterwards."""
        self._give_back(self.num_slots)

    def free(self) -> None:
        """Give all slots back. A second call does nothing."""
        self.num_slots = 0
        self._give_back(0)

    def _give_back(self, num_kept: int) -> None:
        self._arena.give_back(self._slots[num_kept:])
        self._slots = self._slots[:num_kept]
        num_bytes = num_kept * self._slot_bytes
        self._budget.release(self.num_bytes - num_bytes)
        self.num_bytes = num_bytes
