"""Shared by several tests."""

import math
import random
from collections.abc import Sequence

from toy import VOCAB, next_token

from dsd_p2p.session.effects import Candidate
from dsd_p2p.window.static import continuous_tree


def drafter(accuracy: float, rng: random.Random):
    """Candidates that hold the target's own token first with this probability, else anywhere or nowhere.

    With accuracy 0 they never hold it.
    """

    def drafts(text: Sequence[int], width: int) -> list[Candidate]:
        tokens = rng.sample(range(VOCAB), k=min(width, VOCAB))
        truth = next_token(text)
        if rng.random() < accuracy:
            tokens = [truth, *(t for t in tokens if t != truth)][:width]
        elif accuracy == 0:
            tokens = [t for t in tokens if t != truth]
        return [Candidate(token=t, logprob=math.log(0.6 * 0.5**i)) for i, t in enumerate(tokens)]

    return drafts


TREE = continuous_tree(depth=12, width=3, window_nodes=4, max_in_flight=6)
