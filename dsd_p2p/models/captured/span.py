"""Runs a span on a GPU as one graph for each size of pass, so that no time is lost between its kernels.

How it works. A pass over a few rows is hundreds of small kernels, and Python launches them more slowly than the GPU runs
them. A CUDA graph launches all at once, but always over the same addresses. So the sessions' keys and values lie in one
arena (`dsd_p2p.models.captured.arena`), and a pass's rows, slot numbers and masks are copied into buffers of the next
larger size (`dsd_p2p.models.captured.buffers`). The rows of several sessions are one pass whose mask keeps them apart.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.models.captured.arena import Arena, ArenaCache
from dsd_p2p.models.captured.buffers import Buffers, Rows
from dsd_p2p.models.captured.graphs import Capture, Graphs, Outputs, cuda_graphs
from dsd_p2p.models.device import device_type
from dsd_p2p.models.loader import LoadedSpan
from dsd_p2p.models.rows import split_hidden, split_judged
from dsd_p2p.models.stock import StockSpan
from dsd_p2p.types import Span

CAPTURED = "dsd_captured"
"""The attention implementation's name in transformers."""


class CapturedSpan(StockSpan):
    """A span of a model whose layers take several sessions in one pass.

    capture: how passes are captured; None for CUDA graphs on a GPU, and for no capture elsewhere.
    """

    def __init__(
        self, loaded: LoadedSpan, *, device: str = "cpu", cache_bytes: int = 1 << 30, capture: Capture | None = None
    ) -> None:
        super().__init__(loaded, device=device, cache_bytes=cache_bytes)
        self._model.config._attn_implementation = CAPTURED
        # A slot exists in all layers, also for a session of a part of them.
        self._whole_slot_bytes = self.slot_bytes
        self._arena = Arena(cache_bytes // self._whole_slot_bytes + 1)
        is_cuda = device_type(device) == "cuda"
        self._capture = cuda_graphs() if capture is None and is_cuda else capture
        self._graphs = Graphs(self._capture)

    def narrow(self, span: Span) -> Self:
        """Return a model of part of the layers that shares tensors, slots and cache budget with this one.

        Raises:
            ConfigError: the part is not inside this span.
        """
        part = super().narrow(span)
        if part is not self:
            part._graphs = Graphs(self._capture)
        return part

    def new_cache(self, max_slots: int, _mark: int = 0, /) -> ArenaCache:
        """Return an empty cache for up to `max_slots` slots.

        Raises:
            CapacityError: the budget is full.
        """
        return ArenaCache(self._arena, max_slots, self._whole_slot_bytes, self.budget)

    def run(self, passes: Sequence[SpanPass]) -> list[SpanOutput]:
        """See `RunnableSpan`. Threads take turns: all parts of a span share its buffers."""
        with self._arena.in_use:
            return super().run(passes)

    def _run(self, passes: Sequence[SpanPass], inputs: Sequence[Tensor]) -> Sequence[SpanOutput]:
        self._arena.settle()
        rows, given = Rows.of(passes, self._layers), torch.cat(list(inputs), dim=1)
        bucket = rows.bucket
        buffers = self._graphs.buffers(bucket, lambda: Buffers(bucket, given, sorted(rows.attends)))
        buffers.fill(rows, given)
        outputs = self._graphs.run(bucket, buffers, self._compute, self._arena.generation)
        for each in passes:
            each.cache.grow(each.num_rows)
        if not self.is_tail:
            ends = list(itertools.accumulate(each.num_rows for each in passes))
            return split_hidden(outputs.values[: ends[-1]], ends)
        num_wanted = len(rows.wanted)
        if outputs.best is None or outputs.is_finite is None:
            return [[] for _ in passes]
        return split_judged(
            outputs.values[:num_wanted].clone(),
            outputs.best[:num_wanted].tolist(),
            outputs.is_finite[:num_wanted].tolist(),
            [len(each.wanted) for each in passes],
        )

    def _compute(self, buffers: Buffers) -> Outputs:
        has_logits = len(buffers.wanted) > 0
        arguments: dict[str, Any] = {
            "inputs_embeds" if buffers.inputs.is_floating_point() else "input_ids": buffers.inputs,
            "position_ids": buffers.positions,
            "attention_mask": self.by_kind(buffers.masks.__getitem__),
            "past_key_values": _ArenaView(self._arena, buffers),
            "use_cache": True,
        }
        if not has_logits:
            return Outputs(values=self._model.base_model(**arguments)[0][0])
        logits = self._model(**arguments, logits_to_keep=buffers.wanted)[0][0]
        return Outputs(values=logits, best=logits.argmax(dim=-1), is_finite=torch.isfinite(logits.amax(dim=-1)))


class _ArenaView:
    """The cache that transformers' layers see in one pass: they call only `update`."""

    def __init__(self, arena: Arena, buffers: Buffers) -> None:
        self._arena, self._buffers = arena, buffers

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store `[1, heads, rows, head_dim]`; return all slots of the pass, including the new ones."""
        held = self._arena.buffers(layer_idx, keys, values)
        read, written = self._buffers.read, self._buffers.written
        for buffer, new in zip(held, (keys, values), strict=True):
            # What is no number in one session would reach others, because masked slots are multiplied by zero.
            buffer.index_copy_(1, written, new[0].nan_to_num())
        stored = [buffer.index_select(1, read)[None] for buffer in held]
        return stored[0], stored[1]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' sdpa does, with the pass's mask."""
    arguments |= {"is_causal": False}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0], None


ALL_ATTENTION_FUNCTIONS.register(CAPTURED, _attention)
