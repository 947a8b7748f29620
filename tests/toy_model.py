"""The toy target of `toy.py` as the span of a stage server: hidden states are eight bytes, the token itself."""

import struct
from collections.abc import Sequence

import numpy as np
from toy import VOCAB, ToyCache, next_token

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.errors import CapacityError, ConfigError, PrefixLost, RemoteProtocolError
from dsd_p2p.types import Span

ROW = struct.Struct("<q")


class ToySpanCache(ToyCache):
    def __init__(self, model: "ToySpanModel") -> None:
        super().__init__()
        self._model = model
        self._is_free = False
        self.num_bytes = 0

    def copy(self, other: "ToySpanCache", num_slots: int) -> None:
        assert not self.slots
        assert not other._is_free
        if len(other.slots) < num_slots:
            raise PrefixLost("fewer are parked")
        self.slots = other.slots[:num_slots]

    def shrink(self) -> None:
        assert not self._is_free

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            self._model.whole.num_caches -= 1


class ToyView:
    def __init__(self, token: int) -> None:
        self._token = token

    def argmax(self) -> int:
        return self._token

    def logits(self) -> np.ndarray:
        return np.eye(VOCAB, dtype=np.float32)[self._token]


class ToySpanModel:
    """Counts what it is asked to do."""

    def __init__(self, span: Span, num_layers: int, max_caches: int = 1000) -> None:
        self.span = span
        self.num_layers = num_layers
        self.whole = self
        self.is_head = span.first == 0
        self.is_tail = span.last == num_layers
        self.row_bytes = ROW.size
        self.grammars = None
        self.num_caches = 0
        self.num_opened = 0
        self.num_passes = 0
        self.batches: list[int] = []
        self.before_pass = lambda: None
        self._max_caches = max_caches

    def narrow(self, span: Span) -> "ToySpanModel":
        if span == self.span:
            return self
        if not self.span.first <= span.first < span.last <= self.span.last:
            raise ConfigError(f"layers {span} are not inside {self.span}")
        part = ToySpanModel(span, self.num_layers)
        part.whole = self.whole
        return part

    def new_cache(self, max_slots: int, _mark: int = 0, /) -> ToySpanCache:
        if self.whole.num_caches >= self.whole._max_caches:
            raise CapacityError("the toy's memory is full: raise --cache-memory")
        self.whole.num_caches += 1
        self.whole.num_opened += 1
        return ToySpanCache(self)

    def _tokens(self, inputs: Sequence[int] | bytes, num_nodes: int) -> list[int]:
        if not isinstance(inputs, bytes):
            tokens = list(inputs)
        elif len(inputs) != num_nodes * ROW.size:
            raise RemoteProtocolError("hidden states", len(inputs), f"{num_nodes * ROW.size} bytes")
        else:
            tokens = [value for (value,) in ROW.iter_unpack(inputs)]
        if not all(0 <= token < VOCAB for token in tokens):
            raise RemoteProtocolError("token", tokens, f"0..{VOCAB - 1}")
        return tokens

    def run(self, passes: Sequence[SpanPass]) -> list[SpanOutput]:
        self.whole.before_pass()
        self.whole.num_passes += 1
        self.whole.batches.append(len(passes))
        return [self._output(each) for each in passes]

    def _output(self, each: SpanPass) -> SpanOutput:
        try:
            tokens = self._tokens(each.inputs, each.num_rows)
        except RemoteProtocolError as exc:
            return exc
        picks = each.cache.run(tokens, each.forward)
        if not self.is_tail:
            return b"".join(ROW.pack(token) for token in tokens)
        return [ToyView(picks[row]) for row in each.wanted]


class ToyDrafter:
    """Drafts the truth first with a given accuracy, in a thread like a model."""

    name = "toy"

    def __init__(self, drafts, *, is_instant: bool = True) -> None:
        self._drafts = drafts
        self.is_instant = is_instant

    def open(self, max_length: int, sampling: object = None) -> "ToyDrafter":
        return self

    def expand(self, draft):
        texts = [[*draft.tokens, *(token for _, token in stem.path)] for stem in draft.stems]
        return [self._drafts(text, draft.width) for text in texts]

    def close(self) -> None:
        pass


__all__ = ["ROW", "ToyDrafter", "ToySpanModel", "next_token"]
