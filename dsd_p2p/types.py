"""The nouns that flow through every layer."""

import math
from enum import StrEnum
from typing import Annotated, NewType, Protocol, get_type_hints

import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError, ModelError

PeerId = NewType("PeerId", str)
"""A peer's public identity, as libp2p prints it."""

SessionId = NewType("SessionId", bytes)
"""Eight random bytes, chosen by the coordinator."""

TokenId = int

MAX_POSITIONS = 1 << 20
"""Longest text any peer accepts, tokens."""

MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that can be asked for with each of the target's own."""

MAX_STOP_TOKENS = 64
MAX_TOKEN = (1 << 31) - 1

Token = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
Name = Annotated[str, Meta(max_length=128)]
Address = Annotated[str, Meta(max_length=256)]
Position = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The half-open range of decoder layers `[first, last)` that one stage holds."""

    first: Annotated[int, Meta(ge=0, le=4096)]
    last: Annotated[int, Meta(ge=1, le=4096)]

    @property
    def num_layers(self) -> int:
        """Number of layers in the span."""
        return self.last - self.first

    def holds(self, other: "Span") -> bool:
        """True when every layer of `other` is in here."""
        return self.first <= other.first and other.last <= self.last

    def __str__(self) -> str:
        return f"[{self.first}, {self.last})"


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the target picks a token; `temperature == 0` is greedy.

    With `top_k == 0` and `top_p == 1` nothing is cut off. The pick is a function of the logits, `seed` and the
    position alone, see `dsd_p2p.verification.exact`.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0

    @property
    def is_greedy(self) -> bool:
        """True when the pick is the argmax."""
        return self.temperature == 0.0


class RelaxationRule(StrEnum):
    """By what a drafted token may stand that the target would not have written."""

    IMPORTANCE = "importance"
    MARGIN = "margin"


class Relaxation(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Relaxed verification, see `dsd_p2p.verification.adaptive`. Made by `dsd calibrate`.

    tau: weight of the drafter in the blend. max_ce_ratio, max_prob_gap, min_norm_match: beyond any of these a token is key.
    max_overshoot: greatest P_d / P_t. max_margin: of the margin rule, in logits.
    """

    rule: RelaxationRule = RelaxationRule.IMPORTANCE
    tau: Annotated[float, Meta(ge=0, le=1)] = 0.2
    max_ce_ratio: Annotated[float, Meta(ge=0, le=1e9)] = 8.0
    max_prob_gap: Annotated[float, Meta(ge=0, le=1)] = 0.4
    min_norm_match: Annotated[float, Meta(ge=0, le=1)] = 0.6
    max_overshoot: Annotated[float, Meta(ge=1, le=1e9)] = 4.0
    max_margin: Annotated[float, Meta(ge=0, le=1e9)] = 0.3


class TextRequest(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What text is asked for, wherever that is said: to the engine, to a stage, to another coordinator, to an auditor.

    max_tokens: the most new tokens. stop_tokens: the text ends with the first of these, which belongs to it.
    top_logprobs: so many likeliest tokens are reported with each token's own log probability; -1: none at all.
    relaxation: how relaxed mode accepts; None is exact mode.
    constraint: source of a grammar that the text follows; empty is none. No verifier enforces one yet, so each stage
        refuses it (`dsd_p2p.verification.choice`).
    """

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    sampling: Sampling = Sampling()
    stop_tokens: Annotated[tuple[Token, ...], Meta(max_length=MAX_STOP_TOKENS)] = ()
    top_logprobs: Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS)] = -1
    relaxation: Relaxation | None = None
    constraint: Annotated[str, Meta(max_length=1 << 16)] = ""


def check_text_request(request: TextRequest) -> None:
    """Refuse what no stage would take.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    _check_fields(request.sampling)
    _check_fields(request)
    if not math.isfinite(request.sampling.temperature):
        raise ConfigError(f"temperature is {request.sampling.temperature}: give a finite number")


def _check_fields(struct: msgspec.Struct) -> None:
    for name, kind in get_type_hints(type(struct), include_extras=True).items():
        value = getattr(struct, name)
        try:
            msgspec.convert(msgspec.to_builtins(value), kind)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{name} is {value!r}: {exc}") from exc


class ComputeFormat(StrEnum):
    """The numbers that a model computes with; hidden states travel in them."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def value_bytes(self) -> int:
        """Bytes of one value."""
        return 4 if self is ComputeFormat.FLOAT32 else 2


class HiddenFormat(StrEnum):
    """Format of hidden states on one link (`dsd_p2p.wire.hidden`): as the model computes them, or smaller."""

    MODEL = "model"
    BF16 = "bf16"
    INT8 = "int8"


class ModelKey(msgspec.Struct, frozen=True, array_like=True):
    """Which model, exactly: two peers share a route only when their keys are equal.

    digest: of the checkpoint's content (`dsd_p2p.models.source`). weights: how the weights are stored in memory, like
    "float32" or, from a peer that knows it, "q4_k". compute: the numbers of the arithmetic between them.
    """

    digest: Name
    weights: Name
    compute: ComputeFormat

    def __str__(self) -> str:
        formats = self.weights if self.weights == self.compute else f"{self.weights}, computed in {self.compute}"
        return f"{self.digest[:12]} {formats}"


def check_same_model(held: ModelKey | None, asked: ModelKey) -> None:
    """The one place where two peers' models are compared.

    Raises:
        ModelError: they differ: names both.
    """
    if held != asked:
        raise ModelError(
            f"this peer holds model {held or 'none'}, asked for {asked}: start all peers with the same model"
        )


def short_peer(peer: str) -> str:
    """Return a peer id as people are shown it: its last characters, which differ most."""
    return f"…{peer[-6:]}" if len(peer) > 12 else peer or "?"


class UniformRng(Protocol):
    """The part of `random.Random` that the core needs: it is given its randomness."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


GREEDY = Sampling()
"""The target's argmax."""


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """A peer and where to dial it; an empty address: only over a connection that exists."""

    peer: Name
    address: Address = ""


class PeerInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a peer says about itself: its id, its addresses, and which layers of which model it holds.

    span, model: None for a peer that hosts no stage (a coordinator).
    """

    peer: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=8)]
    span: Span | None = None
    num_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    model_name: Name = ""
    model: ModelKey | None = None
    max_positions: Position = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the target thought of one of its tokens: -1000 times the ln of its probability, and the likeliest tokens with theirs."""

    millinats: Annotated[int, Meta(ge=0, le=1 << 30)]
    top: Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()
    top_millinats: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 30)], ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()

    def is_of(self, num_top: int, vocab_size: int) -> bool:
        """True when it is what was asked for: so many tokens at most, of that vocabulary, each with its value."""
        tokens = self.top
        return len(tokens) == len(self.top_millinats) <= num_top and max(tokens, default=0) < vocab_size


class StageCost(msgspec.Struct, frozen=True, array_like=True):
    """What a window took at one stage: microseconds, nodes of all sessions computed in them, and how many sessions."""

    us: Annotated[int, Meta(ge=0, le=1 << 40)]
    num_rows: Annotated[int, Meta(ge=1, le=1 << 24)]
    num_sessions: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
