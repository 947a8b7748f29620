"""Shared by several tests."""

import random

from dsd_p2p.netmodel import LinkModel
from dsd_p2p.session.effects import Candidate
from dsd_p2p.sim.answer import RecordedAnswer
from dsd_p2p.sim.route import RouteModel, simulate_request
from dsd_p2p.sim.service import PassCost
from dsd_p2p.window.tracker import Tracker

TEXTS = (0, 12, 24)


def route_of(num_stages=4, *, link_s=0.05, stage_s=0.005, node_s=0.0, draft_s=0.006):
    return RouteModel(
        stages=(PassCost.line(stage_s, node_s),) * num_stages,
        link=LinkModel(latency_s=link_s),
        draft=PassCost.line(draft_s, 0.0),
    )


class DraftedBy:
    """A recorded answer whose drafts come from elsewhere; `drafts(text)` expands."""

    def __init__(self, answer, expand):
        self.pick, self.expand = answer.pick, expand


def write(trace, text, chain, policy, tracker, max_tokens, drafts=None):
    recorded = trace.texts[text]
    answer = RecordedAnswer(recorded, 1, trace.vocab_size)
    if drafts is not None:
        answer = DraftedBy(answer, lambda draft: drafts.expand(draft, recorded))
    return simulate_request(answer, chain, policy, tracker, min(max_tokens, len(recorded.tokens)))


def tokens_per_s(trace, chain, policy_of, texts=TEXTS, drafts=None, tracker=None, max_tokens=96):
    tracker = tracker or Tracker()
    num_tokens, seconds = 0, 0.0
    for text in texts:
        request = write(trace, text, chain, policy_of(), tracker, max_tokens, drafts)
        assert request.tokens == list(trace.texts[text].tokens[:max_tokens])
        num_tokens += len(request.tokens) - request.arrivals[0][1]
        seconds += request.arrivals[-1][0] - request.arrivals[0][0]
    return num_tokens / seconds


class Useless:
    """Sure of itself and always wrong."""

    def expand(self, draft, recorded):
        rng = random.Random(len(draft.tokens))
        return [
            [Candidate(token=rng.randrange(150_000), logprob=-0.2 - 2 * rank) for rank in range(min(draft.width, 3))]
            for _ in draft.stems
        ]


class Perfect:
    """Knows the text."""

    def expand(self, draft, recorded):
        tokens = recorded.tokens
        ends = [len(draft.tokens) - 1 + len(stem.path) for stem in draft.stems]
        return [[Candidate(token=tokens[end], logprob=-0.001)] if end < len(tokens) else [] for end in ends]


ROUTES = [
    route_of(link_s=link_s, stage_s=stage_s, node_s=node_s, draft_s=draft_s)
    for link_s in (0.001, 0.05)
    for stage_s, node_s in ((0.005, 0.0), (0.02, 0.004), (0.02, 0.02))
    for draft_s in (0.006, 0.03)
]
