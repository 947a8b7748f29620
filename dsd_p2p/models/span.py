"""The layers of one span, run over draft nodes: masks, positions and cache are ours, the arithmetic is transformers'."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError, ModelError, RemoteProtocolError
from dsd_p2p.models.architecture import SLIDING, attention_kinds, read_config, shape_of
from dsd_p2p.models.cache import CacheBudget, KvCache
from dsd_p2p.models.loader import LoadedSpan, load_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.session.slots import Forward
from dsd_p2p.types import Span, TokenId

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LogitsRow:
    """The target's view after one node (`dsd_p2p.verification.base.TargetView`)."""

    def __init__(self, row: torch.Tensor, argmax: TokenId) -> None:
        self.row = row
        self._argmax = argmax

    def argmax(self) -> TokenId:
        """Return the token of the greatest logit."""
        return self._argmax

    def logits(self) -> NDArray[np.float32]:
        """Return float32 `[V]`."""
        array: NDArray[np.float32] = self.row.float().cpu().numpy()
        return array


class SpanModel:
    """A span of a model in memory, with the budget its sessions' caches share.

    source: whose weights. dtype: a key of `DTYPES`. device: a torch device. donor: layers it holds are not loaded again.

    Raises:
        ConfigError: the span or dtype does not exist.
        ModelError: the weights cannot be loaded.
    """

    def __init__(
        self,
        source: ModelSource,
        span: Span,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        cache_bytes: int = 1 << 30,
        donor: "SpanModel | None" = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        config = read_config(source.folder)
        self.shape = shape_of(config)
        self.span = span
        self.is_head = span.first == 0
        self.is_tail = span.last == self.shape.num_layers
        self.budget = CacheBudget(cache_bytes)
        self.torch_dtype = DTYPES[dtype]
        self._device = device
        self._loaded: LoadedSpan = load_span(source, span, self.torch_dtype, device, donor._loaded if donor else None)
        self._model: Any = self._loaded.model
        self._kinds = sorted(set(attention_kinds(config)[span.first : span.last]))
        self._sliding_window = int(getattr(config, "sliding_window", None) or 0)
        self._is_additive_mask = self._model.config._attn_implementation == "eager"

    def narrow(self, span: Span) -> "SpanModel":
        """Return part of the layers as a model that shares tensors and cache budget with this one.

        Raises:
            ConfigError: the part is not inside this span.
        """
        if span == self.span:
            return self
        part = copy.copy(self)
        part._loaded = self._loaded.narrow(span)
        part._model = part._loaded.model
        part.span, part.is_head, part.is_tail = span, span.first == 0, span.last == self.shape.num_layers
        part._kinds = sorted(set(self._loaded.kinds[span.first : span.last]))
        return part

    @property
    def model(self) -> Any:
        """transformers' own module."""
        return self._model

    @property
    def row_bytes(self) -> int:
        """Bytes of one node's hidden state."""
        return self.shape.hidden_size * self.torch_dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the span's tensors, each counted once."""
        tensors = {parameter.data_ptr(): parameter for parameter in self._model.parameters()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def new_cache(self, max_slots: int) -> KvCache:
        """Return an empty cache for up to `max_slots`.

        Raises:
            CapacityError: the budget is full.
        """
        slot_bytes = self.span.num_layers * self.shape.kv_values_per_slot * self.torch_dtype.itemsize
        return KvCache(
            first_layer=self.span.first,
            num_layers=self.span.num_layers,
            max_slots=max_slots,
            num_bytes=max_slots * slot_bytes,
            budget=self.budget,
        )

    @torch.inference_mode()
    def hidden(self, cache: KvCache, forward: Forward, inputs: Sequence[TokenId] | bytes) -> bytes:
        """Return the hidden states `[n, H]` after the span, row-major in the model's dtype.

        inputs: token ids at the head, else the stage before's hidden states in the same format.

        Raises:
            RemoteProtocolError: a token outside the vocabulary, a wrong number of bytes, values that are not finite.
        """
        hidden = self._model.base_model(**self._arguments(cache, forward, inputs))[0]
        cache.grow(len(forward.positions))
        data: bytes = hidden[0].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return data

    @torch.inference_mode()
    def views(
        self, cache: KvCache, forward: Forward, inputs: Sequence[TokenId] | bytes, rows: Sequence[int]
    ) -> list[LogitsRow]:
        """At the tail: run the span and return the target's view after each of `rows`.

        Raises:
            RemoteProtocolError: see `hidden`.
            ModelError: the logits are not finite.
        """
        arguments = self._arguments(cache, forward, inputs)
        if not rows:
            self._model.base_model(**arguments)
            cache.grow(len(forward.positions))
            return []
        kept = torch.tensor(list(rows), device=self._device)
        logits = self._model(**arguments, logits_to_keep=kept).logits[0]
        cache.grow(len(forward.positions))
        best = logits.max(dim=-1)
        if not bool(torch.isfinite(best.values).all()):
            raise ModelError("the target's logits are not finite: check its weights and dtype")
        return [LogitsRow(row, token) for row, token in zip(logits, logits.argmax(dim=-1).tolist(), strict=True)]

    def _arguments(self, cache: KvCache, forward: Forward, inputs: Sequence[TokenId] | bytes) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "attention_mask": self._mask(forward),
            "position_ids": torch.from_numpy(forward.positions)[None].to(self._device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if isinstance(inputs, bytes):
            arguments["inputs_embeds"] = self._read_hidden(inputs, len(forward.positions))
        else:
            if min(inputs) < 0 or max(inputs) >= self.shape.vocab_size:
                raise RemoteProtocolError("token", max(inputs), f"0..{self.shape.vocab_size - 1}")
            arguments["input_ids"] = torch.tensor([list(inputs)], device=self._device)
        return arguments

    def _read_hidden(self, data: bytes, num_nodes: int) -> torch.Tensor:
        expected_bytes = num_nodes * self.row_bytes
        if len(data) != expected_bytes:
            raise RemoteProtocolError(
                "hidden states", f"{len(data)} bytes", f"{expected_bytes} bytes for {num_nodes} nodes"
            )
        hidden = torch.frombuffer(bytearray(data), dtype=self.torch_dtype).view(1, num_nodes, self.shape.hidden_size)
        if not bool(torch.isfinite(hidden).all()):
            raise RemoteProtocolError("hidden states", "NaN or infinity", "finite values")
        return hidden.to(self._device)

    def _mask(self, forward: Forward) -> torch.Tensor | dict[str, torch.Tensor]:
        """What every family takes verbatim: one `[1, 1, n, slots]`, or one per kind where a model mixes kinds."""
        masks = {kind: self._mask_of_kind(kind, forward) for kind in self._kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask_of_kind(self, kind: str, forward: Forward) -> torch.Tensor:
        attends = forward.mask
        if kind == SLIDING:
            attends = attends & (forward.positions[:, None] - forward.slot_positions[None] < self._sliding_window)
        mask = torch.from_numpy(attends)[None, None].to(self._device)
        if not self._is_additive_mask:
            return mask
        # Eager attention adds the mask to the scores: a bool one would silently mean something else.
        additive = torch.zeros(mask.shape, dtype=self.torch_dtype, device=self._device)
        return additive.masked_fill_(~mask, torch.finfo(self.torch_dtype).min)
