"""A slow machine for tests: a span whose passes take longer than they need."""

import time
from collections.abc import Sequence

from dsd_p2p.pipeline.span_model import SpanCache, SpanModel
from dsd_p2p.session.passes import SpanOutput, SpanPass
from dsd_p2p.types import Span


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

    def run(self, passes: Sequence[SpanPass]) -> Sequence[SpanOutput]:
        start_s = time.perf_counter()
        outputs = self._model.run(passes)
        time.sleep((self._factor - 1) * (time.perf_counter() - start_s))
        return outputs
