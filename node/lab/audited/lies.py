"""The ways in which a stage can lie about what it computed.

A lie bends what a stage's model returns, or what the stage sends. The stage signs what it sends with its own key.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.types import ComputeFormat, Span, TokenId
from dsd_p2p.verification.base import TargetView
from dsd_p2p.verification.grammar import Grammars
from dsd_p2p.wire.hidden import from_float32, to_float32
from dsd_p2p.wire.messages import Message, Revealed, Verdict, Window

Bend = Callable[[bytes, bytes, ComputeFormat], bytes]
"""Bends hidden states, given those of the pass before."""

BendView = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Bends the logits after one node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lie:
    """One way to lie.

    rows: bends hidden states. logits: bends the tail's logits. weights: names a changed copy of the model that the stage
    runs instead. skips: how many of its last layers the stage leaves out. sends: changes a message on its way out.
    is_sampled: the answer is sampled. needs_tail: only the tail can lie so.
    """

    name: str
    rows: Bend | None = None
    logits: BendView | None = None
    weights: str = ""
    skips: int = 0
    sends: Callable[[Message], Message | None] | None = None
    is_sampled: bool = False
    needs_tail: bool = False


def _noise(rows: bytes, _last: bytes, compute: ComputeFormat) -> bytes:
    values = to_float32(rows, compute)
    bent = values * np.random.default_rng(len(rows)).normal(1, 0.05, len(values)).astype(np.float32)
    return from_float32(bent, compute)


def _zeros(rows: bytes, _last: bytes, _compute: ComputeFormat) -> bytes:
    return bytes(len(rows))


def _replay(rows: bytes, last: bytes, _compute: ComputeFormat) -> bytes:
    return (last * (len(rows) // len(last) + 1))[: len(rows)] if last else rows


def _second_best(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    best = int(np.argmax(logits))
    bent = logits.copy()
    bent[best] = np.partition(logits, -2)[-2] - np.float32(1e-3)
    return bent


def _forged(message: Message) -> Message:
    """Sign other outputs than those that were sent."""
    if not isinstance(message, Window) or not message.attestations:
        return message
    *before, mine = message.attestations
    outputs = bytes(reversed(mine.outputs))
    return msgspec.structs.replace(message, attestations=(*before, msgspec.structs.replace(mine, outputs=outputs)))


def _silent(message: Message) -> Message | None:
    """Show no rows."""
    return None if isinstance(message, Revealed) else message


def _unsigned(message: Message) -> Message:
    """Give verdicts without signatures."""
    return msgspec.structs.replace(message, attestations=()) if isinstance(message, Verdict) else message


LIES = (
    Lie(name="noise", rows=_noise),
    Lie(name="zeros", rows=_zeros),
    Lie(name="skipped layer", skips=1),
    Lie(name="8-bit weights", weights="8"),
    Lie(name="6-bit weights", weights="6"),
    Lie(name="4-bit weights", weights="4"),
    Lie(name="another checkpoint", weights="other"),
    Lie(name="replayed rows", rows=_replay),
    Lie(name="forged hashes", sends=_forged),
    Lie(name="unsigned verdicts", sends=_unsigned, needs_tail=True),
    Lie(name="silent stage", sends=_silent),
    Lie(name="wrong picks, greedy", logits=_second_best, needs_tail=True),
    Lie(name="wrong picks, sampled", logits=_second_best, needs_tail=True, is_sampled=True),
    Lie(name="8-bit tail", weights="8", needs_tail=True),
    Lie(name="6-bit tail", weights="6", needs_tail=True),
)
"""A colluding pair is one of these, with a replica of the same invite that agrees to everything."""


@contextmanager
def changed_copies(source: ModelSource) -> Iterator[dict[str, ModelSource]]:
    """Yield copies of a model whose weights were rounded to 8, 6 or 4 bits, and one of a slightly trained model."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {}
        for name in ("8", "6", "4", "other"):
            model = load_whole(source, torch.float32)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for path, layer in model.named_modules():
                    if isinstance(layer, torch.nn.Linear) and "lm_head" not in path:
                        _change(layer.weight, name, generator)
            place = Path(folder) / name
            model.save_pretrained(place)
            copies[name] = find_model(str(place), NoProgress())
        yield copies


def _change(weight: torch.Tensor, name: str, generator: torch.Generator) -> None:
    if name == "other":
        weight.mul_(1 + 0.02 * torch.randn(weight.shape, generator=generator))
        return
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (int(name) - 1) - 1)
    weight.copy_((weight / step).round() * step)


class Switch:
    """A span model that can be made to lie. copies: of `changed_copies`. lie: None while it is honest."""

    def __init__(self, source: ModelSource, span: Span, dtype: str, copies: dict[str, ModelSource]) -> None:
        self._copies = copies
        self._span = span
        self._dtype = dtype
        self._compute = ComputeFormat(dtype)
        self._honest: SpanModel = open_span(source, span, dtype=dtype)
        self._others: dict[str, SpanModel] = {}
        self._last = b""
        self.lie: Lie | None = None

    @property
    def grammars(self) -> Grammars | None:
        """See `SpanModel`."""
        return self._honest.grammars

    @property
    def is_head(self) -> bool:
        """See `SpanModel`."""
        return self._honest.is_head

    @property
    def is_tail(self) -> bool:
        """See `SpanModel`."""
        return self._honest.is_tail

    @property
    def row_bytes(self) -> int:
        """See `SpanModel`."""
        return self._honest.row_bytes

    def narrow(self, span: Span) -> "Switch":
        """Return itself: routes use whole spans here."""
        assert span == self._span, "routes use whole spans"
        return self

    def new_cache(self, max_slots: int, mark: int = 0, /) -> SpanCache:
        """See `SpanModel`."""
        return self._model().new_cache(max_slots, mark)

    def run(self, passes: Sequence[SpanPass]) -> Sequence[SpanOutput]:
        """See `SpanModel`."""
        return [self._bent(output) for output in self._model().run(passes)]

    def _model(self) -> SpanModel:
        lie = self.lie
        if lie is not None and lie.skips:
            first, last = self._span.first, self._span.last - lie.skips
            return self._honest.narrow(
                Span(first, last) if not self.is_tail else Span(first + lie.skips, self._span.last)
            )
        if lie is None or not lie.weights:
            return self._honest
        if lie.weights not in self._others:
            self._others[lie.weights] = open_span(self._copies[lie.weights], self._span, dtype=self._dtype)
        return self._others[lie.weights]

    def _bent(self, output: SpanOutput) -> SpanOutput:
        lie, last = self.lie, self._last
        if isinstance(output, bytes):
            self._last = output
            return output if lie is None or lie.rows is None else lie.rows(output, last, self._compute)
        if isinstance(output, Exception) or lie is None or lie.logits is None:
            return output
        return [_BentView(view, lie.logits) for view in output]


class _BentView:
    def __init__(self, view: TargetView, bend: BendView) -> None:
        self._logits = bend(view.logits())

    def argmax(self) -> TokenId:
        return int(np.argmax(self._logits))

    def logits(self) -> NDArray[np.float32]:
        return self._logits
