"""Simulates a slow machine for tests: passes take longer than they need."""

import time
from collections.abc import Sequence

import msgspec

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.models.source import ModelSource
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.types import Span
from dsd_p2p.wire.membership import PeerProfile
from node.config import ServeFlags
from node.member.measure import measure_node


class SlowMachine:
    """A `node.member.measure.Machine` whose passes take `factor` times as long."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def measure(self, source: ModelSource, config: ServeFlags, dtype: str) -> PeerProfile:
        """Return this machine's profile with its times multiplied by the factor."""
        profile = measure_node(source, config, dtype)
        return msgspec.structs.replace(
            profile,
            layer_us=round(profile.layer_us * self._factor),
            layer16_us=round(profile.layer16_us * self._factor),
        )

    def serve(self, model: SpanModel) -> SpanModel:
        """Return the model with its passes slowed down."""
        return model if self._factor == 1 else _Slowed(model, self._factor)


class _Slowed:
    def __init__(self, model: SpanModel, factor: float) -> None:
        self._model = model
        self._factor = factor
        self.is_head = model.is_head
        self.is_tail = model.is_tail
        self.row_bytes = model.row_bytes
        self.grammars = model.grammars

    def narrow(self, span: Span) -> "_Slowed":
        return _Slowed(self._model.narrow(span), self._factor)

    def new_cache(self, max_slots: int, mark: int = 0, /) -> SpanCache:
        return self._model.new_cache(max_slots, mark)

    def run(self, passes: Sequence[SpanPass]) -> Sequence[SpanOutput]:
        start_s = time.perf_counter()
        outputs = self._model.run(passes)
        time.sleep((self._factor - 1) * (time.perf_counter() - start_s))
        return outputs
