"""Describes one pass of a stage's layers over new nodes, and its output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import DsdError
from dsd_p2p.types import TokenId
from dsd_p2p.verification.base import TargetView


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanPass:
    """One pass over new nodes of one session.

    cache: the session's, from the model's `new_cache`. inputs: token ids at the head, elsewhere hidden states `[n, H]`.
    wanted: at the tail, the rows after which the caller needs the target's view.
    """

    cache: Any
    forward: Forward
    inputs: Sequence[TokenId] | bytes
    wanted: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        """Number of nodes that the pass computes."""
        return len(self.forward.positions)


SpanOutput = bytes | Sequence[TargetView] | DsdError
"""Hidden states `[n, H]` after the span; at the tail, the target's view after each wanted row; or the pass's error."""


def hidden_of(output: SpanOutput) -> bytes:
    """Return the hidden states.

    Raises:
        DsdError: the pass failed with this error.
    """
    if isinstance(output, DsdError):
        raise output
    assert isinstance(output, bytes), "a tail gives views"
    return output


def views_of(output: SpanOutput) -> Sequence[TargetView]:
    """Return the target's views.

    Raises:
        DsdError: the pass failed with this error.
    """
    if isinstance(output, DsdError):
        raise output
    assert not isinstance(output, bytes), "only a tail gives views"
    return output
