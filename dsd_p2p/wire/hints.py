"""Defines the messages with which members tell each other how a drafter does on a route (docs/protocol.md, "Hints")."""

from typing import Annotated

import msgspec
from msgspec import Meta

_Permille = Annotated[int, Meta(ge=0, le=1000)]
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_Ranks = Annotated[tuple[_Count, ...], Meta(max_length=64)]

RouteName = Annotated[str, Meta(min_length=1, max_length=16384)]
HintNumber = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class Hits(msgspec.Struct, frozen=True, array_like=True):
    """How often a drafter was right.

    confidence: the probability that it gave its first candidates, in thousandths. exponent: what its probabilities have to
    be raised to, in thousandths. hits, tries: of each rank of its candidates, in tenths, fading.
    """

    confidence: _Permille
    exponent: Annotated[int, Meta(ge=100, le=10_000)]
    hits: _Ranks
    tries: _Ranks


class AskHint(msgspec.Struct, frozen=True, array_like=True, tag=24):
    """Coordinator → member: how does this drafter do on this route? name: both, as the coordinator names them."""

    number: HintNumber
    name: RouteName


class Hint(msgspec.Struct, frozen=True, array_like=True, tag=25):
    """Member → coordinator: what its own requests measured, or nil."""

    number: HintNumber
    known: Hits | None
