"""The seam between the tail's walk and the rule by which the target picks."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import TokenId


class TargetView(Protocol):
    """The target's opinion after one node; what is costly is computed when asked."""

    def argmax(self) -> TokenId:
        """Return the token of the greatest logit, the lowest id among equals."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Return the logits, float32 `[V]`."""
        ...


class Verifier(Protocol):
    """Picks the target's own token."""

    def pick(self, view: TargetView, position: int) -> TokenId:
        """Return the token for `position`: a function of the logits, the settings and the position alone."""
        ...
