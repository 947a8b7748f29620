"""A slow machine for tests: a span whose passes take longer than they need."""

import time
from collections.abc import Sequence
from typing import Any

from dsd_p2p.pipeline.span_model import SpanCache, SpanModel
from dsd_p2p.session.slots import Forward
from dsd_p2p.types import Span, TokenId
from dsd_p2p.verification.base import TargetView


def slowed(model: SpanModel, factor: float) -> SpanModel:
    """Return `model`, or one like it whose passes take `factor` times as long."""
    return model if factor == 1 else _Slowed(model, factor)


class _Slowed:
    def __init__(self, model: SpanModel, factor: float) -> None:
        self._model = model
        self._factor = factor
        self.is_head = model.is_head
        self.is_tail = model.is_tail
        self.row_bytes = model.row_bytes

    def narrow(self, span: Span) -> "_Slowed":
        return _Slowed(self._model.narrow(span), self._factor)

    def new_cache(self, max_slots: int) -> SpanCache:
        return self._model.new_cache(max_slots)

    def hidden(self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes) -> bytes:
        start_s = time.perf_counter()
        result = self._model.hidden(cache, forward, inputs)
        time.sleep((self._factor - 1) * (time.perf_counter() - start_s))
        return result

    def views(
        self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes, rows: Sequence[int]
    ) -> Sequence[TargetView]:
        start_s = time.perf_counter()
        result = self._model.views(cache, forward, inputs, rows)
        time.sleep((self._factor - 1) * (time.perf_counter() - start_s))
        return result
