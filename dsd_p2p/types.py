"""The nouns that flow through every layer."""

import math
from enum import StrEnum
from typing import Annotated, NewType, Protocol

import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError

PeerId = NewType("PeerId", str)
"""A peer's public identity, as libp2p prints it."""

SessionId = NewType("SessionId", bytes)
"""Eight random bytes, chosen by the coordinator."""

TokenId = int

MAX_POSITIONS = 1 << 20
"""Longest text any peer accepts, tokens."""

MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that can be asked for with each of the target's own."""

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


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings that no stage would take.

    Raises:
        ConfigError: which of them, and why.
    """
    try:
        msgspec.convert(msgspec.to_builtins(sampling), Sampling)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"sampling: {exc}") from exc
    if not math.isfinite(sampling.temperature):
        raise ConfigError(f"temperature {sampling.temperature}: a finite number")


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


class UniformRng(Protocol):
    """The part of `random.Random` that the core needs: it is given its randomness."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


GREEDY = Sampling()
"""The target's argmax."""


class PeerInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself: who and where it is and which layers of which model it holds.

    `span` is None for a peer that hosts no stage (a coordinator).
    """

    peer: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=8)]
    span: Span | None = None
    num_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    model_name: Name = ""
    model_digest: Name = ""
    dtype: Name = ""
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
