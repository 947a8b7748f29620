"""Records what a drafter proposes at every position of a text, for agreements that the simulator uses."""

from collections.abc import Sequence

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.session.effects import NUM_CANDIDATES, Draft, Stem
from dsd_p2p.sim.agreement import RecordedText
from dsd_p2p.types import TokenId

MAX_CENTINATS = 690
"""The cutoff for candidates, one in a thousand: less likely ones would fill the file but never enter the tree."""


def record_text(
    drafter: Drafter, source: str, prompt: Sequence[TokenId], answer: Sequence[TokenId], category: str = ""
) -> RecordedText:
    """Return the answer with the drafter's candidates at each position, given the text before it."""
    text = [*prompt, *answer]
    session = drafter.open(len(text) + 1)
    tokens: list[tuple[TokenId, ...]] = []
    centinats: list[tuple[int, ...]] = []
    try:
        for end in range(len(prompt), len(text)):
            (candidates,) = session.expand(
                Draft(
                    tokens=tuple(text[:end]),
                    keys=tuple(range(end)),
                    stems=(Stem(key=end - 1, path=()),),
                    width=NUM_CANDIDATES,
                )
            )
            kept = [each for each in candidates if -100 * each.logprob <= MAX_CENTINATS]
            tokens.append(tuple(each.token for each in kept))
            centinats.append(tuple(max(0, round(-100 * each.logprob)) for each in kept))
    finally:
        session.close()
    return RecordedText(
        category=category,
        source=source,
        tokens=tuple(answer),
        draft_tokens=tuple(tokens),
        draft_centinats=tuple(centinats),
    )
