"""What a stage asks of its layers: one pass over new nodes, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import DsdError
from dsd_p2p.types import TokenId
from dsd_p2p.verification.base import TargetView


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanPass:
    """New nodes of one session.

    cache: of the session, from the model's `new_cache`. inputs: token ids at the head, else hidden states `[n, H]`.
    wanted: at the tail, the rows whose view is wanted.
    """

    cache: Any
    forward: Forward
    inputs: Sequence[TokenId] | bytes
    wanted: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        """Nodes that it computes."""
        return len(self.forward.positions)


SpanOutput = bytes | Sequence[TargetView] | DsdError
"""Hidden states `[n, H]` after the span; at the tail, the target's view after each wanted row; or what is wrong with this pass."""


def hidden_of(output: SpanOutput) -> bytes:
    """Return the hidden states.

    Raises:
        DsdError: what is wrong with the pass.
    """
    if isinstance(output, DsdError):
        raise output
    assert isinstance(output, bytes), "a tail gives views"
    return output


def views_of(output: SpanOutput) -> Sequence[TargetView]:
    """Return the target's views.

    Raises:
        DsdError: what is wrong with the pass.
    """
    if isinstance(output, DsdError):
        raise output
    assert not isinstance(output, bytes), "only a tail gives views"
    return output
