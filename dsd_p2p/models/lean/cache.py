"""Stores the keys and values of one session for the lean layers: one tensor for all layers, by slot."""

import torch
from torch import Tensor

from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.errors import PrefixLost
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.models.lean.layer import SLOT_PAD


class LeanCache:
    """Keys (rotated, interleaved) and values, float32 `[layers, 2, kv heads, slots, head_dim]`, within a budget.

    Unused slots hold finite numbers, because the attention multiplies them by zero. Behind the last slot is room for the
    padding.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, max_slots: int, budget: CacheBudget
    ) -> None:
        self.num_bytes = 2 * num_layers * num_kv_heads * head_dim * (max_slots + SLOT_PAD) * 4
        budget.reserve(self.num_bytes)
        self._budget = budget
        self.kv = torch.zeros(num_layers, 2, num_kv_heads, max_slots + SLOT_PAD, head_dim)
        self.num_slots = 0

    @property
    def allocated_bytes(self) -> int:
        """The size of the buffer."""
        return self.kv.nbytes

    def grow(self, num_nodes: int) -> None:
        """Mark `num_nodes` more slots as used."""
        self.num_slots += num_nodes

    @torch.inference_mode()
    def edit(self, edit: CacheEdit) -> None:
        """Keep the first slots and move the gathered ones after them.

        Raises:
            LocalProtocolError: some of these slots were never filled.
        """
        edit.check(self.num_slots)
        if len(edit.gathered):
            self.kv[:, :, :, edit.num_kept : edit.num_slots] = self.path(torch.from_numpy(edit.gathered))
        # What a bad window left there may be no number, and would turn up again in the padding.
        self.kv[:, :, :, edit.num_slots : self.num_slots] = 0
        self.num_slots = edit.num_slots

    def path(self, slots: Tensor) -> Tensor:
        """Return a copy of the keys and values of some slots."""
        return self.kv.index_select(3, slots)

    @torch.inference_mode()
    def copy(self, other: "LeanCache", num_slots: int) -> None:
        """Copy the first slots of another session's cache for the same layers into this one, which must be empty.

        Raises:
            PrefixLost: the other cache holds fewer.
        """
        if other.num_slots < num_slots:
            raise PrefixLost(f"{num_slots} tokens were requested, but only {other.num_slots} are parked here")
        self.kv[:, :, :, :num_slots] = other.kv[:, :, :, :num_slots]
        self.num_slots = num_slots

    @torch.inference_mode()
    def shrink(self) -> None:
        """Give the unused memory back. Nothing can be added afterwards."""
        self.kv = self.kv[:, :, :, : self.num_slots].clone()
        self._budget.release(self.num_bytes - self.kv.nbytes)
        self.num_bytes = self.kv.nbytes

    def free(self) -> None:
        """Give the memory back to the budget. A second call does nothing."""
        self.kv = self.kv.new_empty(0)
        self._budget.release(self.num_bytes)
        self.num_bytes = 0
