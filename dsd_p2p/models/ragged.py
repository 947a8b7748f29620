"""Runs one pass over the nodes of several sessions: all rows in one matrix, but separate attention for each session.

Nothing is padded. Modules that work row by row (projections, MLPs, norms) get `[1, sum n, H]`. Attention gets only the
session's own keys, values and mask, exactly as if the session ran alone.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsd_p2p.models.cache import KvCache

RAGGED = "dsd_ragged"
"""The attention implementation's name in transformers."""

_running: ContextVar["RaggedCache"] = ContextVar("dsd_ragged")
# A context variable, because not every family passes unknown keyword arguments on to its attention.


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One session's rows, `[start, end)`, in the pass.

    masks: bool `[1, 1, n, slots]` for each kind of attention; None if every row attends to every slot, as a single new
        token does.
    """

    cache: KvCache
    start: int
    end: int
    masks: Mapping[str, torch.Tensor | None]


class RaggedCache:
    """The cache that the attention layers use in a pass over several sessions.

    kinds: the kind of attention of each layer of the whole model.
    """

    def __init__(self, segments: Sequence[Segment], kinds: Sequence[str]) -> None:
        self._segments = segments
        self._kinds = kinds
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each session's `[1, heads, n, head_dim]` to its own cache."""
        self._stored = [
            each.cache.update(keys[:, :, each.start : each.end], values[:, :, each.start : each.end], layer_idx)
            for each in self._segments
        ]
        return keys, values

    def attend(self, module: torch.nn.Module, query: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Return the attention's output for all sessions, `[1, sum n, heads, head_dim]`."""
        kind = self._kinds[int(module.layer_idx)]  # type: ignore[arg-type]
        arguments |= {"is_causal": False}
        parts = [
            sdpa_attention_forward(
                module, query[:, :, each.start : each.end], keys, values, each.masks[kind], **arguments
            )[0]
            for each, (keys, values) in zip(self._segments, self._stored, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

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


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    _key: torch.Tensor,
    _value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    return _running.get().attend(module, query, **arguments), None


ALL_ATTENTION_FUNCTIONS.register(RAGGED, _attention)
