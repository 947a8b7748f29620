"""Runs the layers of one span over nodes, with our masks, positions and cache and transformers' arithmetic."""

import itertools
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.cache.slots import Forward
from dsd_p2p.models.cache import KvCache
from dsd_p2p.models.layer_masks import layer_masks
from dsd_p2p.models.loader import LoadedSpan
from dsd_p2p.models.ragged import RAGGED, RaggedCache, Segment
from dsd_p2p.models.recurrent.cache import HybridCache
from dsd_p2p.models.recurrent.memory import RecurrentMemory
from dsd_p2p.models.recurrent.mixers import bind_mixers
from dsd_p2p.models.recurrent.paths import Paths
from dsd_p2p.models.rows import attends_by_kind, split_hidden, split_views
from dsd_p2p.models.stock import StockSpan
from dsd_p2p.types import ComputeFormat

_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)

TORCH_DTYPES = {
    ComputeFormat.FLOAT32: torch.float32,
    ComputeFormat.BFLOAT16: torch.bfloat16,
    ComputeFormat.FLOAT16: torch.float16,
}


class PassOrder(StrEnum):
    """How the layers of a family take the windows of several sessions: in one pass, or one after the other."""

    TOGETHER = "together"
    ALONE = "alone"


class SpanModel(StockSpan):
    """A span of a model whose sessions have a cache each.

    loaded: the layers, in the memory order that `PassOrder` and device allow. order: whether the layers can take
    several sessions in one pass.
    """

    def __init__(
        self, loaded: LoadedSpan, order: PassOrder, *, device: str = "cpu", cache_bytes: int = 1 << 30
    ) -> None:
        super().__init__(loaded, device=device, cache_bytes=cache_bytes)
        self._plain_layers: set[int] = set()
        self._is_ragged = order is PassOrder.TOGETHER
        if self._is_ragged:
            self._model.config._attn_implementation = RAGGED
        if self.shape.is_recurrent:
            assert self._is_ragged, "recurrent layers look for the pass's segments"
            bind_mixers(self._model)

    def new_cache(self, max_slots: int, mark: int = 0, /) -> KvCache | HybridCache:
        """Return an empty cache for up to `max_slots` slots; see `dsd_p2p.stage.span_model`.

        Raises:
            CapacityError: the budget is full.
        """
        kv = KvCache(
            first_layer=self.span.first,
            num_layers=self.span.num_layers,
            max_slots=max_slots,
            num_bytes=max_slots * self.slot_bytes,
            budget=self.budget,
        )
        return HybridCache(kv, RecurrentMemory(self.budget, mark)) if self.shape.is_recurrent else kv

    def _groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Families that have only eager attention run one session after the other."""
        return [indices] if self._is_ragged else [[index] for index in indices]

    def _run(self, passes: Sequence[SpanPass], inputs: Sequence[torch.Tensor]) -> Sequence[SpanOutput]:
        ends = list(itertools.accumulate(each.num_rows for each in passes))
        starts = [0, *ends[:-1]]
        positions = torch.from_numpy(np.concatenate([each.forward.positions for each in passes]))[None]
        arguments: dict[str, Any] = {
            "inputs_embeds" if inputs[0].is_floating_point() else "input_ids": torch.cat(list(inputs), dim=1),
            "position_ids": positions.to(self._device),
        }
        rows = [start + row for start, each in zip(starts, passes, strict=True) for row in each.wanted]
        model = self._model if rows else self._model.base_model
        if rows:
            arguments["logits_to_keep"] = torch.tensor(rows, device=self._device)
        if self._is_ragged:
            segments = [
                Segment(
                    cache=each.cache,
                    start=start,
                    end=end,
                    masks=self._masks(each.forward),
                    recurrent_paths=self._begin(each),
                )
                for each, start, end in zip(passes, starts, ends, strict=True)
            ]
            # Attention uses the segments' masks. This one only keeps transformers from making its own.
            arguments["attention_mask"] = self.by_kind(lambda _layer: _NO_MASK.to(self._device))
            cache = RaggedCache(segments, self.shape.kinds, self._plain_layers)
            result = cache.run(model, arguments)[0][0]
        else:
            (only,) = passes
            masks = {kind: self._additive(mask, only.forward) for kind, mask in self._masks(only.forward).items()}
            with layer_masks(masks):
                by_kind = next(iter(masks.values())) if self.shape.has_slot_masks else self.by_kind(masks.__getitem__)
                arguments["attention_mask"] = by_kind
                result = model(**arguments, past_key_values=only.cache, use_cache=True)[0][0]
            only.cache.grow(only.num_rows)
        if not self.is_tail:
            return split_hidden(result, ends)
        return split_views(result if rows else result[:0], [len(each.wanted) for each in passes])

    def _begin(self, each: SpanPass) -> Paths | None:
        return each.cache.begin(each.forward, self._device) if self.shape.is_recurrent else None

    def _masks(self, forward: Forward) -> dict[str, torch.Tensor | None]:
        """Return for each kind of attention a mask of the slots that each node attends to, bool `[1, 1, n, slots]`.

        None stands for a mask that is all true.
        """
        attends = attends_by_kind(forward, self._layers)
        return {
            kind: None if mask.all() else torch.from_numpy(mask)[None, None].to(self._device)
            for kind, mask in attends.items()
        }

    def _additive(self, mask: torch.Tensor | None, forward: Forward) -> torch.Tensor:
        """Return the mask in additive form: eager attention adds it to the scores and would misread a bool mask."""
        additive = torch.zeros((1, 1, *forward.mask.shape), dtype=self.torch_dtype, device=self._device)
        return additive if mask is None else additive.masked_fill_(~mask, torch.finfo(self.torch_dtype).min)
