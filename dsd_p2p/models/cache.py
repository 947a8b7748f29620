"""Stores the keys and values of a session at a stage, by slot, within a memory budget."""

import threading

import torch

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import CapacityError, PrefixLost


class CacheBudget:
    """The cache memory that all sessions of a stage share."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int) -> None:
        """Reserve `num_bytes`.

        Raises:
            CapacityError: fewer are free.
        """
        with self._lock:
            free_bytes = self.max_bytes - self.used_bytes
            if num_bytes > free_bytes:
                raise CapacityError(
                    f"a session needs {num_bytes / 2**20:.0f} MiB of cache, {free_bytes / 2**20:.0f} of "
                    f"{self.max_bytes / 2**20:.0f} MiB are free: raise --cache-memory, ask for fewer tokens, or wait"
                )
            self.used_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give `num_bytes` back."""
        with self._lock:
            self.used_bytes -= num_bytes


class KvCache:
    """The KV cache of one session, in the interface of transformers' attention layers, which call only `update`.

    Each layer's buffers, `[1, heads, max_slots, head_dim]`, are allocated at first use. `num_slots` slots are in use,
    and `num_bytes` of the budget are reserved.
    """

    def __init__(
        self, *, first_layer: int, num_layers: int, max_slots: int, num_bytes: int, budget: CacheBudget
    ) -> None:
        budget.reserve(num_bytes)
        self._budget = budget
        self.num_bytes = num_bytes
        self._first_layer = first_layer
        self._max_slots = max_slots
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self.num_slots = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[1, heads, n, head_dim]` after the slots in use; return all slots, including the new ones."""
        layer = layer_idx - self._first_layer
        end = self.num_slots + keys.shape[2]
        stored_keys, stored_values = self._keys[layer], self._values[layer]
        if stored_keys is None or stored_values is None:
            stored_keys = self._keys[layer] = _buffer(keys, self._max_slots)
            stored_values = self._values[layer] = _buffer(values, self._max_slots)
        stored_keys[:, :, self.num_slots : end] = keys
        stored_values[:, :, self.num_slots : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def get_seq_length(self, *_args: object) -> int:
        """Return the number of slots in use, by the name that transformers' models know."""
        return self.num_slots

    @property
    def allocated_bytes(self) -> int:
        """The size of the buffers that exist so far."""
        return sum(each.nbytes for each in (*self._keys, *self._values) if each is not None)

    def grow(self, num_nodes: int) -> None:
        """Mark `num_nodes` more slots as used. Call it after all layers have been updated."""
        self.num_slots += num_nodes

    @torch.inference_mode()
    def edit(self, edit: CacheEdit) -> None:
        """Keep the first slots and move the gathered ones after them.

        Raises:
            LocalProtocolError: some of these slots were never filled.
        """
        edit.check(self.num_slots)
        if len(edit.gathered):
            index = torch.from_numpy(edit.gathered)
            for tensor in (*self._keys, *self._values):
                if tensor is not None:
                    # index_select makes a copy, so source and destination may overlap.
                    moved = tensor.index_select(2, index.to(tensor.device))
                    tensor[:, :, edit.num_kept : edit.num_slots] = moved
        self.num_slots = edit.num_slots

    @torch.inference_mode()
    def copy(self, other: "KvCache", num_slots: int) -> None:
        """Copy the first slots of another session's cache for the same layers into this one, which must be empty.

        Raises:
            PrefixLost: the other cache holds fewer.
        """
        if other.num_slots < num_slots:
            raise PrefixLost(f"{num_slots} tokens were requested, but only {other.num_slots} are parked here")
        self._keys = [_copied(tensor, num_slots, self._max_slots) for tensor in other._keys]
        self._values = [_copied(tensor, num_slots, self._max_slots) for tensor in other._values]
        self.num_slots = num_slots

    @torch.inference_mode()
    def shrink(self) -> None:
        """Give the unused memory back. Nothing can be added afterwards."""
        for tensors in (self._keys, self._values):
            # One tensor at a time, because two copies of all of them might not fit into memory.
            for layer, tensor in enumerate(tensors):
                tensors[layer] = _copied(tensor, self.num_slots, self.num_slots)
        num_bytes = self.num_bytes * self.num_slots // self._max_slots
        self._budget.release(self.num_bytes - num_bytes)
        self.num_bytes, self._max_slots = num_bytes, self.num_slots

    def free(self) -> None:
        """Give the memory back to the budget. A second call does nothing."""
        self._keys.clear()
        self._values.clear()
        self._budget.release(self.num_bytes)
        self.num_bytes = 0


def _copied(tensor: torch.Tensor | None, num_used: int, num_slots: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    copied = _buffer(tensor, num_slots)
    copied[:, :, :num_used] = tensor[:, :, :num_used]
    return copied


def _buffer(like: torch.Tensor, num_slots: int) -> torch.Tensor:
    batch, heads, _, head_dim = like.shape
    return like.new_empty(batch, heads, num_slots, head_dim)
