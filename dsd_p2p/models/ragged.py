"""Runs one pass over the nodes of several sessions: all rows in one matrix, but separate attention for each session.

Nothing is padded. Modules that work row by row (projections, MLPs, norms) get `[1, sum n, H]`. Attention gets only the
session's own keys, values and mask, exactly as if the session ran alone.

How it works. A layer hands its new rows to `update`, may change what it gets back, and calls the attention. Most layers
pass on what they got: then each session's slots are used where they lie. Some do not: latent attention stores a latent
and expands it, others repeat heads or halve the values. They get the slots of all sessions in one tensor, and the
attention takes that apart again. Which sort a layer is shows in its first pass.

Recurrent layers ask the running pass for its segments (`dsd_p2p.models.recurrent.mixers`). They find no earlier state
in their cache, so they always take the way for several positions, in which their convolution and scan are ours.
"""

from collections.abc import Mapping, MutableSet, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsd_p2p.errors import ModelError
from dsd_p2p.models.cache import KvCache
from dsd_p2p.models.recurrent.cache import HybridCache
from dsd_p2p.models.recurrent.memory import RecurrentMemory
from dsd_p2p.models.recurrent.paths import Paths

RAGGED = "dsd_ragged"
"""The attention implementation's name in transformers."""

_running: ContextVar["RaggedCache"] = ContextVar("dsd_ragged")
# A context variable, because not every family passes unknown keyword arguments on to its attention.

_Stored = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One session's rows, `[start, end)`, in the pass.

    masks: bool `[1, 1, n, slots]` for each kind of attention; None if every row attends to every slot, as a single new
        token does.
    recurrent_paths: None for a model without recurrent layers.
    """

    cache: KvCache | HybridCache
    start: int
    end: int
    masks: Mapping[str, torch.Tensor | None]
    recurrent_paths: Paths | None = None

    @property
    def memory(self) -> RecurrentMemory:
        """What the recurrent layers keep of the session."""
        assert isinstance(self.cache, HybridCache), "only a model with recurrent layers asks"
        return self.cache.recurrent

    @property
    def paths(self) -> Paths:
        """Where recurrent layers look."""
        assert self.recurrent_paths is not None, "only a model with recurrent layers asks"
        return self.recurrent_paths


class RaggedCache:
    """The cache that the attention layers use in a pass over several sessions.

    kinds: the kind of attention of each layer of the whole model.
    plain_layers: the layers that pass on what `update` gives them; grows as they show it.
    """

    def __init__(self, segments: Sequence[Segment], kinds: Sequence[str], plain_layers: MutableSet[int]) -> None:
        self._segments = segments
        self._kinds = kinds
        self._plain_layers = plain_layers
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stored: _Stored = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each session's `[1, heads, n, head_dim]` to its own cache."""
        stored = [
            each.cache.update(keys[:, :, each.start : each.end], values[:, :, each.start : each.end], layer_idx)
            for each in self._segments
        ]
        if len(stored) == 1:
            ((keys, values),) = stored
        elif layer_idx not in self._plain_layers:
            keys = torch.cat([each[0] for each in stored], dim=2)
            values = torch.cat([each[1] for each in stored], dim=2)
        self._given, self._stored = (keys, values), stored
        return keys, values

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
    ) -> torch.Tensor:
        """Return the attention's output for all sessions, `[1, sum n, heads, head_dim]`."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        kind = self._kinds[layer]
        arguments |= {"is_causal": False}
        parts = [
            sdpa_attention_forward(
                module, query[:, :, each.start : each.end], keys, values, each.masks[kind], **arguments
            )[0]
            for each, (keys, values) in zip(self._segments, self._by_session(layer, key, value), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _by_session(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> _Stored:
        """Return each session's keys and values, from the tensors that the layer calls the attention with."""
        if self._given is not None and key is self._given[0] and value is self._given[1]:
            self._plain_layers.add(layer)
            return self._stored
        if layer in self._plain_layers:
            raise ModelError(f"layer {layer} changed its keys and values in one pass but not in another")
        counts = [each.cache.num_slots + each.end - each.start for each in self._segments]
        return list(zip(torch.split(key, counts, dim=2), torch.split(value, counts, dim=2), strict=True))

    @property
    def segments(self) -> Sequence[Segment]:
        """The sessions' rows."""
        return self._segments

    def get_conv_state(self, *_args: object, **_kwargs: object) -> None:
        """Say that there is none, so that the layer calls the convolution."""

    def get_recurrent_state(self, *_args: object, **_kwargs: object) -> None:
        """Say that there is none, so that the layer calls the scan for several positions."""

    def is_recording_past(self, *_args: object) -> bool:
        """Return True, so that a single row takes the way of several."""
        return True

    def update_conv_state(self, rows: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        """Return the new rows alone: the convolution finds the earlier ones."""
        return rows

    def update_recurrent_state(self, *_args: object, **_kwargs: object) -> None:
        """Do nothing: the scan has stored what it needs."""

    def run(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        """Run transformers' module with this as its cache, and return its result."""
        token = _running.set(self)
        try:
            result = model(**arguments, past_key_values=self, use_cache=True)
        finally:
            _running.reset(token)
        for each in self._segments:
            each.cache.grow(each.end - each.start)
        return result


def running_segments() -> Sequence[Segment]:
    """Return the segments of the pass that runs."""
    return _running.get().segments


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' sdpa does. The mask that the model hands over is not used: each session has its own."""
    del attention_mask
    return _running.get().attend(module, query, key, value, **arguments), None


ALL_ATTENTION_FUNCTIONS.register(RAGGED, _attention)
