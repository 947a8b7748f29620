"""The seam between the tail's walk and the rule by which the target picks.

A `Verifier` is the rule; `open` starts a `VerifierSession` on one text. The session holds whatever earlier tokens decide, so
it is handed over with the cache when a stage goes on after a loss, and it is rewound when the text is.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import TokenId
from dsd_p2p.verification.importance import DraftOpinion


class TargetView(Protocol):
    """The target's opinion after one node; what is costly is computed when asked."""

    def argmax(self) -> TokenId:
        """Return the token of the greatest logit, the lowest id among equals."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Return the logits, float32 `[V]`."""
        ...


class Pick(NamedTuple):
    """A token to commit; `is_relaxed` when the target itself would have written another."""

    token: TokenId
    is_relaxed: bool


class VerifierSession(Protocol):
    """Decides the tokens of one text, one position after the other."""

    @property
    def length(self) -> int:
        """Tokens of the text so far; the next token is for this position."""
        ...

    def judge(self, view: TargetView, draft: DraftOpinion | None) -> Pick:
        """Return the token for the next position, given what the drafter expects there, if that is known.

        The text does not go on by this alone: `accept` follows.

        Raises:
            ModelError: the logits are not finite.
            RemoteProtocolError: the drafter's tokens are not the vocabulary's.
        """
        ...

    def accept(self, token: TokenId) -> None:
        """Let the text go on with `token`, picked here or written before."""
        ...

    def rewind(self, length: int) -> None:
        """Take tokens back until `length` are left; never into the prompt."""
        ...


class Verifier(Protocol):
    """A rule by which the target picks."""

    def open(self, num_prompt: int) -> VerifierSession:
        """Start on a text whose first `num_prompt` tokens are its prompt."""
        ...
