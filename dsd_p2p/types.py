"""Defines the types that every layer shares."""

import math
from enum import StrEnum
from typing import Annotated, NewType, Protocol, get_type_hints

import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError, ModelError

PeerId = NewType("PeerId", str)
"""A peer's public id, as libp2p prints it."""

SessionId = NewType("SessionId", bytes)
"""Eight random bytes, chosen by the coordinator."""

TokenId = int

MAX_POSITIONS = 1 << 20
"""The longest text that any peer accepts, in tokens."""

MAX_TOP_LOGPROBS = 20
"""The most alternatives that a request may ask for with each token."""

MAX_STOP_TOKENS = 64
MAX_CONSTRAINT = 1 << 16
"""The longest constraint, in characters."""

MAX_SEEN = 1 << 15
"""The most different tokens of a prompt that a repetition penalty can name."""

MAX_TOKEN = (1 << 31) - 1

Token = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
Name = Annotated[str, Meta(max_length=128)]
ModelName = Annotated[str, Meta(max_length=1024)]
"""A catalog name, a Hugging Face id or a folder."""
Digest = Annotated[str, Meta(max_length=64)]
"""A sha256 in hexadecimal, or empty where none is known."""
Address = Annotated[str, Meta(max_length=256)]
Position = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A half-open range of decoder layers, `[first, last)`, that one stage holds."""

    first: Annotated[int, Meta(ge=0, le=4096)]
    last: Annotated[int, Meta(ge=1, le=4096)]

    @property
    def num_layers(self) -> int:
        """Number of layers in the span."""
        return self.last - self.first

    def holds(self, other: "Span") -> bool:
        """Return whether this span contains every layer of `other`."""
        return self.first <= other.first and other.last <= self.last

    def __str__(self) -> str:
        return f"[{self.first}, {self.last})"


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """The sampling parameters with which the target picks a token; `temperature == 0` is greedy.

    With `top_k == 0` and `top_p == 1` every token can be picked. The pick depends only on the logits, `seed` and the
    position (`dsd_p2p.verification.exact`).
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the pick is the argmax."""
        return self.temperature == 0.0


MAX_BUDGET = 10.0
"""The largest budget of relaxed mode, in nats a token; more than any token is worth."""


class RelaxationRule(StrEnum):
    """The rule by which relaxed mode accepts a drafted token that the target did not pick."""

    IMPORTANCE = "importance"
    MARGIN = "margin"


class Relaxation(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The thresholds of relaxed mode (`dsd_p2p.verification.adaptive`), as written by `dsd calibrate`.

    tau: the drafter's weight in the blend.
    max_ce_ratio, max_prob_gap, min_norm_match: a token is decisive above either maximum or below the minimum.
    max_overshoot: the greatest ratio P_d / P_t allowed.
    max_margin: the largest gap to the target's pick that the margin rule allows, in logits.
    budget: the most that the text may lose by the target's own likelihood, in nats a token, at any point of it.
    """

    rule: RelaxationRule = RelaxationRule.IMPORTANCE
    tau: Annotated[float, Meta(ge=0, le=1)] = 0.2
    max_ce_ratio: Annotated[float, Meta(ge=0, le=1e9)] = 8.0
    max_prob_gap: Annotated[float, Meta(ge=0, le=1)] = 0.4
    min_norm_match: Annotated[float, Meta(ge=0, le=1)] = 0.6
    max_overshoot: Annotated[float, Meta(ge=1, le=1e9)] = 4.0
    max_margin: Annotated[float, Meta(ge=0, le=1e9)] = 0.3
    budget: Annotated[float, Meta(ge=0, le=MAX_BUDGET)] = 0.02


class ConstraintKind(StrEnum):
    """The language in which a constraint is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """A set of texts, of which the answer must be one (`dsd_p2p.verification.grammar`).

    source: a JSON schema, a regular expression, or a context-free grammar in Lark's notation or GBNF.
    """

    kind: ConstraintKind
    source: Annotated[str, Meta(min_length=1, max_length=MAX_CONSTRAINT)]


class Shaping(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Changes to the target's logits before it picks (`dsd_p2p.verification.shaped`).

    bias: what is added to the logits of some tokens. presence: subtracted from those that the answer already has.
    frequency: the same, for each time. repetition: divides the positive and multiplies the negative logits of tokens
    that the answer has or that are in `seen`, the prompt's. min_p: cuts tokens that are less likely than this share of
    the likeliest. min_tokens: no stop token before the answer has so many.
    """

    bias: Annotated[tuple[tuple[Token, Annotated[float, Meta(ge=-100, le=100)]], ...], Meta(max_length=1024)] = ()
    presence: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition: Annotated[float, Meta(gt=0, le=10)] = 1.0
    seen: Annotated[tuple[Token, ...], Meta(max_length=MAX_SEEN)] = ()
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITIONS)] = 0


class TextRequest(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A description of the text to generate, given to the engine, to stages, to other coordinators and to auditors.

    max_tokens: the most new tokens. stop_tokens: the text ends after the first of these.
    top_logprobs: how many alternatives to report beside each token's own log probability; -1 reports neither.
    relaxation: the thresholds of relaxed mode; None means exact mode.
    shaping: changes to the logits. constraint: what the answer must be. Both are exact: relaxed mode does not apply.
    """

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    sampling: Sampling = Sampling()
    stop_tokens: Annotated[tuple[Token, ...], Meta(max_length=MAX_STOP_TOKENS)] = ()
    top_logprobs: Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS)] = -1
    relaxation: Relaxation | None = None
    shaping: Shaping | None = None
    constraint: Constraint | None = None


def check_text_request(request: TextRequest) -> None:
    """Check that a stage would accept `request`.

    Raises:
        ConfigError: a field is out of range. The text names the field, its value and what is allowed.
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
    """The number format in which a model computes; hidden states are sent in it unless a link uses a smaller one."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def value_bytes(self) -> int:
        """The size of one value in bytes."""
        return 4 if self is ComputeFormat.FLOAT32 else 2


class HiddenFormat(StrEnum):
    """The format of hidden states on one link: the model's own, or a smaller one (`dsd_p2p.wire.hidden`)."""

    MODEL = "model"
    BF16 = "bf16"
    INT8 = "int8"


INT8, STORED = "int8", "stored"
"""The weights formats of `dsd_p2p.models.lean`: rounded to int8, or a checkpoint's own 4-bit numbers where it has some.

Both compute in float32 between their products.
"""


class ModelKey(msgspec.Struct, frozen=True, array_like=True):
    """The exact identity of a model. Two peers can share a route only if their keys are equal.

    digest: a hash of the checkpoint (`dsd_p2p.models.source`).
    weights: the format of the weights in memory: a number format, "int8" or "stored".
    compute: the number format of the arithmetic.
    """

    digest: Name
    weights: Name
    compute: ComputeFormat

    def __str__(self) -> str:
        formats = self.weights if self.weights == self.compute else f"{self.weights}, computed in {self.compute}"
        return f"{self.digest[:12]} {formats}"


def check_same_model(held: ModelKey | None, asked: ModelKey) -> None:
    """Compare the model that a peer holds with the one it is asked for. No other code compares them.

    Raises:
        ModelError: they differ. The text names both.
    """
    if held != asked:
        raise ModelError(
            f"this peer holds model {held or 'none'} but was asked for {asked}: start all peers with the same model"
        )


def short_peer(peer: str) -> str:
    """Return a peer id shortened for display to its last characters, which differ most."""
    return f"…{peer[-6:]}" if len(peer) > 12 else peer or "?"


class UniformRng(Protocol):
    """The part of `random.Random` that the core needs. The core takes its randomness as a parameter."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


GREEDY = Sampling()
"""Always pick the target's argmax."""


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """A peer and its address. If the address is empty, only an existing connection can be used."""

    peer: Name
    address: Address = ""


class PeerInfo(msgspec.Struct, frozen=True, array_like=True):
    """A peer's description of itself: its id, its addresses, and the model and layers that it holds.

    span, model: None for a peer that serves no stage, such as a coordinator.
    """

    peer: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=8)]
    span: Span | None = None
    num_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    model_name: Name = ""
    model: ModelKey | None = None
    max_positions: Position = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The target's log probabilities at one position: of the committed token and of the likeliest tokens.

    millinats, top_millinats: -1000 times the natural logarithm of the probability.
    """

    millinats: Annotated[int, Meta(ge=0, le=1 << 30)]
    top: Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()
    top_millinats: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 30)], ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()

    def is_of(self, num_top: int, vocab_size: int) -> bool:
        """Return whether it has at most `num_top` alternatives, all in the vocabulary and each with its value."""
        tokens = self.top
        return len(tokens) == len(self.top_millinats) <= num_top and max(tokens, default=0) < vocab_size


class StageCost(msgspec.Struct, frozen=True, array_like=True):
    """The cost of a window at one stage.

    us: microseconds. num_rows: nodes of all sessions computed in that time. num_sessions: how many shared it.
    """

    us: Annotated[int, Meta(ge=0, le=1 << 40)]
    num_rows: Annotated[int, Meta(ge=1, le=1 << 24)]
    num_sessions: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
