"""The seam between the tail's walk and the rule by which the target picks."""

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


class Verifier(Protocol):
    """Decides the next token."""

    def judge(self, view: TargetView, position: int, draft: DraftOpinion | None) -> Pick:
        """Return the token for `position`, given what the drafter thinks of it, if that is known.

        Raises:
            ModelError: the logits are not finite.
        """
        ...
