"""Checks a verdict before the coordinator acts on it (docs/protocol.md, rule 8: Verdicts)."""

from collections.abc import Sequence

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.session.request import Request
from dsd_p2p.types import TokenId
from dsd_p2p.wire.messages import Verdict


def check_verdict(verdict: Verdict, request: Request, tokens: Sequence[TokenId], epoch: int, num_sent: int) -> None:
    """Check a verdict against the request and the committed text.

    tokens: prompt and committed tokens. epoch: the present epoch. num_sent: nodes sent in it.

    Raises:
        RemoteProtocolError: names the invalid field and what was expected.
    """
    text = request.text
    if verdict.epoch > epoch:
        raise RemoteProtocolError("verdict epoch", verdict.epoch, f"at most {epoch}")
    if len(verdict.settled) != len(verdict.tokens):
        raise RemoteProtocolError("settled", len(verdict.settled), f"{len(verdict.tokens)} entries, one per token")
    num_logprobs = len(verdict.tokens) if text.top_logprobs >= 0 else 0
    if len(verdict.logprobs) != num_logprobs:
        raise RemoteProtocolError("logprobs", len(verdict.logprobs), f"{num_logprobs} entries")
    if not all(each.is_of(text.top_logprobs, request.vocab_size) for each in verdict.logprobs):
        limit = f"{text.top_logprobs} of {request.vocab_size} tokens each"
        raise RemoteProtocolError("logprobs", "others", limit)
    first_new, last_start = len(request.prompt), len(tokens) + num_sent
    if not first_new <= verdict.start_pos <= last_start:
        raise RemoteProtocolError("start_pos", verdict.start_pos, f"{first_new}..{last_start}")
    if max(verdict.tokens) >= request.vocab_size:
        raise RemoteProtocolError("verdict tokens", "one outside the vocabulary", f"below {request.vocab_size}")
    known = tokens[verdict.start_pos : verdict.start_pos + len(verdict.tokens)]
    if tuple(known) != verdict.tokens[: len(known)]:
        raise RemoteProtocolError("verdict tokens", "others", f"the {len(known)} that are committed")
