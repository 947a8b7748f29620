"""Provides the stages and the drafter of the fake ring: recorded tokens and set service times replace the models.

Everything else is the live system: processes, sockets, stage server, coordinator. So the protocol can be measured at
stage times that this machine could not reach with a real model.
"""

import struct
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsd_p2p import units
from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.drafting.base import DraftSession
from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.sim.agreement import Agreement, read_agreement
from dsd_p2p.sim.recorded import RecordedDrafts, recorded_pick
from dsd_p2p.types import GREEDY, ComputeFormat, ModelKey, PeerInfo, Sampling, Span, TokenId
from dsd_p2p.verification.grammar import Grammars
from node.config import NodeConfig

MODEL_NAME = "recorded"
_KEY = ModelKey(digest="recorded", weights="float32", compute=ComputeFormat.FLOAT32)
_TOKEN = struct.Struct("<q")


class ServiceTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The service times and sizes of the fake stages.

    trace: the agreement's file. stage_s + node_s * n: seconds of a pass over n nodes. row_bytes: size of a node's
    hidden state.
    """

    trace: str
    stage_s: float
    node_s: float = 0.0
    row_bytes: int = 3072
    """The size of a hidden state of Qwen2.5 1.5B: H = 1536 in bfloat16."""


class FakeStage(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the fake ring. The ring has `num_stages` of them, each with one "layer"."""

    config: NodeConfig
    times: ServiceTimes
    num_stages: int


def bundled_agreement() -> Path:
    """Return the path of the agreement that comes with the project."""
    return Path(str(files("node").joinpath("data/agreement.json.gz")))


def stage_info(peer: str, addresses: tuple[str, ...], span: Span, num_stages: int) -> PeerInfo:
    """Return how a fake stage describes itself: it holds one "layer"."""
    return PeerInfo(
        peer=peer,
        addresses=addresses,
        span=span,
        num_layers=num_stages,
        model_name=MODEL_NAME,
        model=_KEY,
        max_positions=1 << 16,
    )


def load_recorded(
    stage: FakeStage, config: NodeConfig, peer: str, addresses: tuple[str, ...]
) -> "tuple[RecordedSpan, PeerInfo]":
    """Load the recorded texts for a stage of the fake ring (`node.local.stage_node.LoadStage`).

    Raises:
        ConfigError: they cannot be read.
    """
    span = units.span(config.span)
    model = RecordedSpan(span, stage.num_stages, stage.times, read_agreement(Path(stage.times.trace)))
    return model, stage_info(peer, addresses, span, stage.num_stages)


class RecordedCache:
    """A cache that remembers only which text is written: the token at position 0."""

    def __init__(self) -> None:
        self.text: TokenId = -1
        self.num_bytes = 0

    def edit(self, edit: CacheEdit) -> None:
        """Do nothing: no slots to move."""

    def copy(self, other: "RecordedCache", num_slots: int) -> None:
        """Continue the other cache's text."""
        self.text = other.text

    def shrink(self) -> None:
        """Do nothing: no memory to give back."""

    def free(self) -> None:
        """Do nothing: no memory to free."""


class RecordedView:
    """The target's view at a position where the recorded text continues with `token`."""

    def __init__(self, token: TokenId, vocab_size: int) -> None:
        self._token = token
        self._vocab_size = vocab_size

    def argmax(self) -> TokenId:
        """Return the recorded token."""
        return self._token

    def logits(self) -> NDArray[np.float32]:
        """Return logits that give the recorded token nearly all probability."""
        logits = np.full(self._vocab_size, -100.0, np.float32)
        logits[self._token] = 0.0
        return logits


class RecordedSpan:
    """A stage's layers that only sleep. A node's hidden state is its token, padded to `row_bytes`."""

    def __init__(self, span: Span, num_stages: int, times: ServiceTimes, trace: Agreement) -> None:
        self._span = span
        self.is_head = span.first == 0
        self.is_tail = span.last == num_stages
        self.row_bytes = times.row_bytes
        self.weight_bytes = 0
        self.grammars: Grammars | None = None
        self._times = times
        self._trace = trace

    def narrow(self, span: Span) -> "RecordedSpan":
        """Return self: a fake stage holds one "layer".

        Raises:
            ConfigError: `span` is another one.
        """
        if span != self._span:
            raise ConfigError(f"this fake stage holds layers {self._span}, not {span}")
        return self

    def new_cache(self, max_slots: int, _mark: int = 0, /) -> RecordedCache:
        """Return an empty cache."""
        return RecordedCache()

    def run(self, passes: Sequence[SpanPass]) -> list[SpanOutput]:
        """Sleep as long as one pass over all the nodes takes. The rows pass the tokens on."""
        end_s = time.perf_counter() + self._times.stage_s + self._times.node_s * sum(each.num_rows for each in passes)
        outputs = [self._output(each) for each in passes]
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return outputs

    def _output(self, each: SpanPass) -> SpanOutput:
        inputs, cache, positions = each.inputs, each.cache, each.forward.positions
        tokens = (
            [_TOKEN.unpack_from(inputs, start)[0] for start in range(0, len(inputs), self.row_bytes)]
            if isinstance(inputs, bytes)
            else list(inputs)
        )
        if positions[0] == 0:
            if not 0 <= tokens[0] < len(self._trace.texts):
                return RemoteProtocolError("text number", tokens[0], f"0..{len(self._trace.texts) - 1}")
            cache.text = tokens[0]
        if not self.is_tail:
            return b"".join(_TOKEN.pack(token).ljust(self.row_bytes, b"\0") for token in tokens)
        # The tail only walks along the recorded path, so a node off that path may get any pick.
        last = len(self._trace.texts[cache.text].tokens) - 1
        return [
            RecordedView(recorded_pick(self._trace, cache.text, min(int(positions[row]), last)), self._trace.vocab_size)
            for row in each.wanted
        ]


class RecordedDrafter:
    """A drafter that proposes the recorded candidates, `draft_s` seconds after it is asked."""

    name = "recorded"
    is_instant = False

    def __init__(self, trace: Agreement, draft_s: float) -> None:
        self._drafts = RecordedDrafts(trace)
        self._draft_s = draft_s

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> DraftSession:
        """Start a request. The drafter keeps no state for it."""
        return self

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return the recorded children of each stem."""
        end_s = time.perf_counter() + self._draft_s
        children = self._drafts.expand(draft)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return children

    def close(self) -> None:
        """Do nothing: nothing to free."""
