"""Stages and drafter of the fake ring: recorded tokens and service times where a real swarm computes.

Everything else is the live system: processes, sockets, stage server, coordinator. So the protocol can be measured at stage times
that this machine could not compute at.
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
from node.config import NodeConfig

MODEL_NAME = "recorded"
_KEY = ModelKey(digest="recorded", weights="float32", compute=ComputeFormat.FLOAT32)
_TOKEN = struct.Struct("<q")


class ServiceTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What the fake stages take and send.

    trace: the file of the recorded texts. stage_s + node_s * n: seconds of a pass over n nodes. row_bytes: hidden state of a node.
    """

    trace: str
    stage_s: float
    node_s: float = 0.0
    row_bytes: int = 3072
    """H = 1536 in bfloat16, Qwen2.5 1.5B."""


class FakeStage(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the fake ring, which has `num_stages` of them with one "layer" each."""

    config: NodeConfig
    times: ServiceTimes
    num_stages: int


def bundled_agreement() -> Path:
    """Return the agreement trace that the project brings along."""
    return Path(str(files("node").joinpath("data/agreement.json.gz")))


def stage_info(peer: str, addresses: tuple[str, ...], span: Span, num_stages: int) -> PeerInfo:
    """Return what a fake stage says of itself: it holds one "layer"."""
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
    """Load the recorded texts of a stage of the fake ring (`node.local.stage_node.LoadStage`).

    Raises:
        ConfigError: they cannot be read.
    """
    span = units.span(config.span)
    model = RecordedSpan(span, stage.num_stages, stage.times, read_agreement(Path(stage.times.trace)))
    return model, stage_info(peer, addresses, span, stage.num_stages)


class RecordedCache:
    """Remembers only which text is written: the token at position 0."""

    def __init__(self) -> None:
        self.text: TokenId = -1
        self.num_bytes = 0

    def edit(self, edit: CacheEdit) -> None:
        """Nothing to move."""

    def copy(self, other: "RecordedCache", num_slots: int) -> None:
        """Go on with the other's text."""
        self.text = other.text

    def shrink(self) -> None:
        """Nothing to give back."""

    def free(self) -> None:
        """Nothing to free."""


class RecordedView:
    """The target's view where it goes on to write `token`."""

    def __init__(self, token: TokenId, vocab_size: int) -> None:
        self._token = token
        self._vocab_size = vocab_size

    def argmax(self) -> TokenId:
        """Return the recorded token."""
        return self._token

    def logits(self) -> NDArray[np.float32]:
        """Return logits that are certain."""
        logits = np.full(self._vocab_size, -100.0, np.float32)
        logits[self._token] = 0.0
        return logits


class RecordedSpan:
    """A stage server's model that sleeps; a node's hidden state is its token and padding."""

    def __init__(self, span: Span, num_stages: int, times: ServiceTimes, trace: Agreement) -> None:
        self._span = span
        self.is_head = span.first == 0
        self.is_tail = span.last == num_stages
        self.row_bytes = times.row_bytes
        self.weight_bytes = 0
        self._times = times
        self._trace = trace

    def narrow(self, span: Span) -> "RecordedSpan":
        """Return ourselves: a fake stage holds one "layer".

        Raises:
            ConfigError: another one is asked for.
        """
        if span != self._span:
            raise ConfigError(f"layers {span} are not this fake stage's {self._span}")
        return self

    def new_cache(self, max_slots: int) -> RecordedCache:
        """Return an empty cache."""
        return RecordedCache()

    def run(self, passes: Sequence[SpanPass]) -> list[SpanOutput]:
        """Sleep as long as one pass over all the nodes takes; rows carry the tokens on."""
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
        # Nobody asks about a node off the recorded path.
        last = len(self._trace.texts[cache.text].tokens) - 1
        return [
            RecordedView(recorded_pick(self._trace, cache.text, min(int(positions[row]), last)), self._trace.vocab_size)
            for row in each.wanted
        ]


class RecordedDrafter:
    """Proposes what the recorded drafter proposed, `draft_s` after it was asked."""

    name = "recorded"
    is_instant = False

    def __init__(self, trace: Agreement, draft_s: float) -> None:
        self._drafts = RecordedDrafts(trace)
        self._draft_s = draft_s

    def open(self, max_length: int, sampling: Sampling = GREEDY) -> DraftSession:
        """Start on a request; there is nothing to remember."""
        return self

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's recorded children."""
        end_s = time.perf_counter() + self._draft_s
        children = self._drafts.expand(draft)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return children

    def close(self) -> None:
        """Nothing to free."""
