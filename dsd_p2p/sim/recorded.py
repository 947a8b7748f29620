"""Gives recorded answers in place of a live drafter and target.

The prompt of such a request is one token, the number of the text.
"""

from msgspec.structs import replace

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.sim.agreement import Agreement
from dsd_p2p.sim.answer import RecordedAnswer
from dsd_p2p.types import TokenId


def recorded_pick(trace: Agreement, text: TokenId, position: int) -> TokenId:
    """Return the target's token after `position` of text number `text`; position 0 is the prompt's only token."""
    return trace.texts[text].tokens[position]


class RecordedDrafts:
    """A recorded drafter. It expands any stem of any text of `trace`, one level at a time."""

    def __init__(self, trace: Agreement) -> None:
        self._answers = [RecordedAnswer(text, 1, trace.vocab_size) for text in trace.texts]

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's children, likeliest first."""
        return self._answers[draft.tokens[0]].expand(replace(draft, levels=1))
