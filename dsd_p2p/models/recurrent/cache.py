"""The cache of a session of a model with recurrent layers: keys and values by slot, and what the others keep."""

import torch

from dsd_p2p.cache.slots import CacheEdit, Forward
from dsd_p2p.errors import PrefixLost
from dsd_p2p.models.cache import KvCache
from dsd_p2p.models.recurrent.memory import RecurrentMemory
from dsd_p2p.models.recurrent.paths import Paths


class HybridCache:
    """A `KvCache` for the attention layers and a `RecurrentMemory` for the recurrent ones, edited together."""

    def __init__(self, kv: KvCache, recurrent: RecurrentMemory) -> None:
        self._kv = kv
        self.recurrent = recurrent

    @property
    def num_slots(self) -> int:
        """The number of slots in use."""
        return self._kv.num_slots

    @property
    def num_bytes(self) -> int:
        """The memory that it takes from the budget."""
        return self._kv.num_bytes + self.recurrent.num_bytes

    @property
    def allocated_bytes(self) -> int:
        """The size of the buffers that exist so far."""
        return self._kv.allocated_bytes + self.recurrent.num_bytes

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; see `KvCache.update`."""
        return self._kv.update(keys, values, layer_idx, *args, **named)

    def get_seq_length(self, *_args: object) -> int:
        """Return the number of slots in use, by the name that transformers' models know."""
        return self._kv.num_slots

    @torch.inference_mode()
    def begin(self, forward: Forward, device: str) -> Paths:
        """Fold what is settled, and return where the recurrent layers look in this pass."""
        self.recurrent.fold(forward.num_settled, self._kv.num_slots)
        return Paths(forward.mask[:, self.recurrent.num_folded :], device)

    def grow(self, num_nodes: int) -> None:
        """Mark more slots as used. Call it after all layers have run."""
        self._kv.grow(num_nodes)

    @torch.inference_mode()
    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots.

        Raises:
            LocalProtocolError: some of these slots were never filled.
            PrefixLost: the recurrent layers' state is that of a longer text.
        """
        edit.check(self._kv.num_slots)
        self.recurrent.edit(edit)
        self._kv.edit(edit)

    @torch.inference_mode()
    def copy(self, other: "HybridCache", num_slots: int) -> None:
        """Copy the first slots of another session's cache for the same layers into this one, which must be empty.

        Raises:
            PrefixLost: the other cache holds fewer, or its recurrent layers have no state for that length.
            CapacityError: the budget is full.
        """
        if other.num_slots < num_slots:
            raise PrefixLost(f"{num_slots} tokens were requested, but only {other.num_slots} are parked here")
        self.recurrent.copy(other.recurrent, num_slots)
        self._kv.copy(other._kv, num_slots)

    @torch.inference_mode()
    def shrink(self) -> None:
        """Give the unused memory back. Nothing can be added afterwards."""
        self.recurrent.shrink(self._kv.num_slots)
        self._kv.shrink()

    def free(self) -> None:
        """Give the memory back to the budget. A second call does nothing."""
        self.recurrent.free()
        self._kv.free()
