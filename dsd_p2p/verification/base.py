"""Defines the interface between the tail's walk and the rule that picks the target's tokens.

A `Verifier` is the rule; its `open` starts a `VerifierSession` for one text. The session holds the state that depends
on earlier tokens. So it is handed over with the cache when a stage goes on after a loss, and rewound when the text is.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import TokenId
from dsd_p2p.verification.importance import DraftOpinion


class TargetView(Protocol):
    """The target's opinion after one node; costly values are computed on demand."""

    def argmax(self) -> TokenId:
        """Return the token with the greatest logit; among equals, the lowest id."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Return the logits, float32 `[V]`."""
        ...


class Pick(NamedTuple):
    """A token to commit; `is_relaxed` if the target itself would have written another.

    loss: how much likelier the target finds its own token, in nats.
    """

    token: TokenId
    is_relaxed: bool
    loss: float = 0.0


class VerifierSession(Protocol):
    """One text whose tokens are decided one position after the other."""

    @property
    def length(self) -> int:
        """Number of tokens so far, which is the position of the next token."""
        ...

    def judge(self, view: TargetView, draft: DraftOpinion | None) -> Pick:
        """Return the token for the next position. draft: the drafter's opinion there, if it is known.

        This does not extend the text: call `accept` afterwards.

        Raises:
            ModelError: the logits are not finite.
            RemoteProtocolError: a token of the drafter's is outside the vocabulary or occurs twice.
        """
        ...

    def gap(self, view: TargetView, pick: TokenId, claimed: TokenId) -> float:
        """Return how far the logits would have to be off for the target to pick `claimed` instead of `pick`.

        Call it after `judge` and before `accept`. Infinite for a token that cannot be picked.
        """
        ...

    def accept(self, token: TokenId) -> None:
        """Extend the text by `token`, which was picked here or is already written."""
        ...

    def rewind(self, length: int) -> None:
        """Drop the tokens after the first `length`; `length` includes at least the prompt."""
        ...


class Verifier(Protocol):
    """A rule that picks the target's tokens."""

    def open(self, num_prompt: int) -> VerifierSession:
        """Start a text whose first `num_prompt` tokens are its prompt."""
        ...
