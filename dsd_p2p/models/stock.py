"""What all ways to run transformers' own modules share: the span's layers, their sizes, and the cache budget."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch

from dsd_p2p.models.architecture import FULL, WITHOUT_ATTENTION
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.models.int8 import Int8Linear
from dsd_p2p.models.loader import LoadedSpan
from dsd_p2p.models.packed import PackedLinear
from dsd_p2p.models.rows import RunnableSpan
from dsd_p2p.types import Span


class StockSpan(RunnableSpan):
    """A span of a model in memory, with the memory budget that its sessions' caches share.

    loaded: the layers, in the memory order that `PassOrder` and device allow.
    """

    def __init__(self, loaded: LoadedSpan, *, device: str, cache_bytes: int) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self.shape = loaded.shape
        self.budget = CacheBudget(cache_bytes)
        self.torch_dtype: torch.dtype = loaded.dtype
        self._device = device
        self._set_span(loaded.span)

    def _set_span(self, span: Span) -> None:
        self.span, self.is_head, self.is_tail = span, span.first == 0, span.last == self.shape.num_layers
        self._layers = self.shape.layers[span.first : span.last]

    def narrow(self, span: Span) -> Self:
        """Return a model of part of the layers that shares tensors and cache budget with this one.

        Raises:
            ConfigError: the part is not inside this span.
        """
        if span == self.span:
            return self
        part = copy.copy(self)
        part._loaded = self._loaded.narrow(span)
        part._model = part._loaded.model
        part._set_span(span)
        return part

    @property
    def loaded(self) -> LoadedSpan:
        """The layers, for another model to take over."""
        return self._loaded

    @property
    def model(self) -> Any:
        """transformers' own module."""
        return self._model

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one node's hidden state."""
        return self.shape.hidden_size * self.torch_dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """The size in bytes of one token's keys and values in all layers."""
        return sum(layer.kv_values for layer in self._layers) * self.torch_dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """The total size in bytes of the span's tensors; a shared tensor counts once."""
        # A checkpoint's buffers count as well: a router's bias is one.
        tensors = {tensor.data_ptr(): tensor for tensor in self._model.state_dict().values()}
        packed_bytes = sum(
            each.num_bytes for each in self._model.modules() if isinstance(each, PackedLinear | Int8Linear)
        )
        num_bytes: int = packed_bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return num_bytes

    def by_kind(self, mask: Callable[[str], torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor | None]:
        """Return the masks in the form that every family accepts: one mask, or one per kind if a model mixes kinds."""
        masks: dict[str, torch.Tensor | None] = {
            kind: mask(kind) for kind in sorted({layer.kind for layer in self._layers if layer.attends})
        }
        if self.shape.is_recurrent:
            # These families look up both kinds, whatever layers the span has; recurrent layers need no mask.
            return {FULL: mask(FULL), **masks, **dict.fromkeys(WITHOUT_ATTENTION)}
        return masks if len(masks) > 1 else mask(next(iter(masks)))
