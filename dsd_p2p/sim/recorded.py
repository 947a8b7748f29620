"""A target and a drafter that say what real ones said: recorded tokens instead of forward passes.

A request's prompt is one token, the number of the text to write. On the recorded path the drafter proposes what it proposed
then. Off it nothing was recorded, and nothing can be committed there; but such nodes compete for places in the tree, so
they get the probabilities of another recorded position, chosen by their path, and tokens of their own.
"""

import zlib
from collections.abc import Sequence

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.sim.trace import AgreementTrace, RecordedText
from dsd_p2p.types import TokenId


def recorded_pick(trace: AgreementTrace, text: TokenId, position: int) -> TokenId:
    """Return the target's token after `position` of text number `text`; position 0 is the prompt's only token."""
    return trace.texts[text].tokens[position]


class RecordedDrafts:
    """What the drafter said, for any stem of any text of `trace`."""

    def __init__(self, trace: AgreementTrace) -> None:
        self._trace = trace

    def expand(self, draft: Draft) -> list[list[Candidate]]:
        """Return each stem's children, likeliest first."""
        text = self._trace.texts[draft.tokens[0]]
        return [self._children(text, len(draft.tokens) - 1, stem.path, draft.width) for stem in draft.stems]

    def _children(
        self, text: RecordedText, start: int, path: Sequence[tuple[int, TokenId]], width: int
    ) -> list[Candidate]:
        tokens = [token for _, token in path]
        end = start + len(tokens)
        if end >= len(text.tokens):
            return []
        if tuple(tokens) == text.tokens[start:end]:
            proposed, centinats = text.draft_tokens[end], text.draft_centinats[end]
        else:
            salt = zlib.crc32(repr((start, tokens)).encode())
            elsewhere = salt % len(text.tokens)
            centinats = text.draft_centinats[elsewhere]
            proposed = tuple((salt + rank) % self._trace.vocab_size for rank in range(len(centinats)))
        pairs = zip(proposed[:width], centinats[:width], strict=True)
        return [Candidate(token=token, logprob=-value / 100) for token, value in pairs]
