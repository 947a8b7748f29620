"""A span of a model in int8, as the stage server runs it (`dsd_p2p.stage.span_model`)."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import ModelShape
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.models.lean.build import Built, Norm
from dsd_p2p.models.lean.cache import LeanCache
from dsd_p2p.models.lean.embedding import Rows, RowsOnDisk
from dsd_p2p.models.lean.layer import SLOT_PAD
from dsd_p2p.models.lean.products import num_bytes_of
from dsd_p2p.models.lean.rotary import Rotary
from dsd_p2p.models.lean.views import Segment, SessionViews
from dsd_p2p.models.rows import RunnableSpan, attends_by_kind, split_hidden, split_views
from dsd_p2p.types import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What comes before the first and after the last layer. norm, head: of the tail."""

    embedding: Rows | RowsOnDisk | None = None
    norm: Norm | None = None
    head: nn.Module | None = None

    def of(self, *, is_head: bool, is_tail: bool) -> "Ends":
        """Return those that belong to a span."""
        return Ends(
            embedding=self.embedding if is_head else None,
            norm=self.norm if is_tail else None,
            head=self.head if is_tail else None,
        )

    def with_those_of(self, other: "Ends") -> "Ends":
        """Return these and those of another part of the model."""
        return Ends(
            embedding=self.embedding or other.embedding,
            norm=self.norm or other.norm,
            head=self.head or other.head,
        )

    @property
    def num_bytes(self) -> int:
        """The size of the weights."""
        embedding = 0 if self.embedding is None else self.embedding.num_bytes
        return embedding + (0 if self.head is None else num_bytes_of(self.head))


class LeanSpan(RunnableSpan):
    """The layers of a span and the ends that belong to it, in memory, with the budget that the caches share.

    is_by_row: run each row alone over its own ancestors: exact on any machine, and slow.
    """

    def __init__(
        self,
        *,
        shape: ModelShape,
        span: Span,
        layers: Sequence[Built],
        ends: Ends,
        rotary: Rotary,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.shape, self.span = shape, span
        self.layers = list(layers)
        self.ends = ends
        self.rotary = rotary
        self.budget = CacheBudget(cache_bytes)
        self.is_by_row = False
        self._heads = layers[0].heads

    @property
    def is_head(self) -> bool:
        """True when the span starts with the embedding."""
        return self.span.first == 0

    @property
    def is_tail(self) -> bool:
        """True when the span ends with the norm and the LM head."""
        return self.span.last == self.shape.num_layers

    def narrow(self, span: Span) -> "LeanSpan":
        """Return a model of part of the layers that shares tensors and cache budget with this one.

        Raises:
            ConfigError: the part is not inside this span.
        """
        if span == self.span:
            return self
        if not self.span.first <= span.first < span.last <= self.span.last:
            raise ConfigError(f"layers {span} are not inside {self.span}")
        part = copy.copy(self)
        part.span = span
        part.layers = self.layers[span.first - self.span.first : span.last - self.span.first]
        part.ends = self.ends.of(is_head=part.is_head, is_tail=part.is_tail)
        return part

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one node's hidden state."""
        return self.shape.hidden_size * 4

    @property
    def weight_bytes(self) -> int:
        """The size in bytes of the span's weights."""
        return sum(layer.num_bytes for layer in self.layers) + self.ends.num_bytes

    def new_cache(self, max_slots: int, _mark: int = 0, /) -> LeanCache:
        """Return an empty cache for up to `max_slots` slots.

        Raises:
            CapacityError: the budget is full.
        """
        return LeanCache(
            num_layers=self.span.num_layers,
            num_kv_heads=self._heads.num_kv,
            head_dim=self._heads.head_dim,
            max_slots=max_slots,
            budget=self.budget,
        )

    def _run(self, passes: Sequence[SpanPass], inputs: Sequence[Tensor]) -> list[SpanOutput]:
        x = self._embedded(torch.cat(list(inputs), dim=1)[0])
        if self.is_by_row:
            x = torch.cat([self._run_by_row(each, rows) for each, rows in _paired(passes, x)])
        else:
            x = self._run_layers([self._segment(each.cache, each.forward) for each in passes], x)
            for each in passes:
                each.cache.grow(each.num_rows)
        ends = list(itertools.accumulate(each.num_rows for each in passes))
        if not self.is_tail:
            return split_hidden(x, ends)
        starts = [end - each.num_rows for end, each in zip(ends, passes, strict=True)]
        wanted = [start + row for start, each in zip(starts, passes, strict=True) for row in each.wanted]
        rows = [[row] for row in wanted] if self.is_by_row else [wanted]
        logits = torch.cat([self._logits(x[each]) for each in rows or [[]]])
        return split_views(logits, [len(each.wanted) for each in passes])

    def _segment(self, cache: LeanCache, forward: Forward) -> Segment:
        layers = self.shape.layers[self.span.first : self.span.last]
        return Segment(cache=cache, forward=forward, attends=attends_by_kind(forward, layers))

    def _embedded(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            return inputs
        assert self.ends.embedding is not None, "only the head takes tokens"
        return self.ends.embedding(inputs)

    def _run_layers(self, segments: Sequence[Segment], x: Tensor) -> Tensor:
        """Return the hidden states after the layers; `x` may be changed."""
        heads, num_rows = self._heads, len(x)
        y = x.new_empty(num_rows, (heads.num_q + 2 * heads.num_kv) * heads.head_dim)
        out = x.new_empty(num_rows, heads.num_q * heads.head_dim)
        views: list[SessionViews] = []
        start = 0
        for each in segments:
            end = start + len(each.forward.positions)
            views.append(SessionViews(each, y[start:end], out[start:end], self.layers, self.rotary, heads))
            start = end
        parts = [each.part for each in views]
        attention = {
            name: [each.attention[name] for each in views]
            for name in {(each.kind, each.rotation) for each in self.layers}
        }
        for index, layer in enumerate(self.layers):
            slots = [each.slots[index] for each in views]
            x = layer.run(x, y, out, parts, slots, attention[layer.kind, layer.rotation])
        return x

    def _run_by_row(self, each: SpanPass, x: Tensor) -> Tensor:
        """Run one row after another, each over a copy of its ancestors that has no gaps, as if it were decoded alone."""
        rows = []
        for row in range(each.num_rows):
            forward = each.forward.part(row, row + 1)
            path = torch.from_numpy(forward.mask[0].nonzero()[0])
            alone = copy.copy(each.cache)
            alone.kv = nn.functional.pad(each.cache.path(path), (0, 0, 0, SLOT_PAD))
            alone.num_slots = len(path) - 1
            positions = forward.slot_positions[path.numpy()]
            chain = Forward(positions=forward.positions, slot_positions=positions, mask=forward.mask[:, path.numpy()])
            rows.append(self._run_layers([self._segment(alone, chain)], x[row : row + 1]))
            each.cache.kv[:, :, :, each.cache.num_slots] = alone.kv[:, :, :, alone.num_slots]
            each.cache.grow(1)
        return torch.cat(rows)

    def _logits(self, x: Tensor) -> Tensor:
        assert self.ends.norm is not None and self.ends.head is not None, "only the tail gives logits"
        norm = self.ends.norm
        rows = x * norm.weight
        sizes = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
        root = torch.linalg.vector_norm(x, 2, -1, True)
        factor = torch.addcmul(torch.tensor(norm.eps), root, root, value=1.0 / x.shape[-1]).rsqrt_()
        logits: Tensor = self.ends.head(rows.div_(sizes)).mul_(sizes.mul_(factor))
        return logits


def _paired(passes: Sequence[SpanPass], x: Tensor) -> list[tuple[SpanPass, Tensor]]:
    counts = [each.num_rows for each in passes]
    return list(zip(passes, torch.split(x, counts), strict=True))
