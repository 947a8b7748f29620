"""The core under every interleaving: whatever is drafted and in whatever order messages travel, the text is the target's."""

import math
import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, ToyNetwork, next_token, plain_text

from dsd_p2p.session.effects import Candidate, Draft, Send
from dsd_p2p.window.base import Decision, Mode
from dsd_p2p.window.static import PLAIN, continuous_tree, sync_chain
from dsd_p2p.wire.messages import Window

DECISIONS = [
    PLAIN,
    sync_chain(1),
    sync_chain(4),
    Decision(mode=Mode.SYNC, depth=4, width=2, expand_nodes=2, window_nodes=9, max_nodes=8),
    continuous_tree(depth=12, width=1, window_nodes=1, max_in_flight=6),
    continuous_tree(depth=12, width=3, window_nodes=4, max_in_flight=6),
    continuous_tree(depth=6, width=2, window_nodes=2, max_in_flight=2),
]


def drafter(accuracy: float, rng: random.Random):
    """Candidates that hold the target's own token first with this probability, else anywhere or nowhere."""

    def drafts(text: Sequence[int], width: int) -> list[Candidate]:
        tokens = rng.sample(range(VOCAB), k=min(width, VOCAB))
        truth = next_token(text)
        if rng.random() < accuracy:
            tokens = [truth, *(t for t in tokens if t != truth)][:width]
        return [Candidate(token=t, logprob=math.log(0.6 * 0.5**i)) for i, t in enumerate(tokens)]

    return drafts


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    decision=st.sampled_from(DECISIONS),
    num_stages=st.integers(1, 4),
    accuracy=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    num_tokens=st.integers(1, 40),
)
def test_every_mode_writes_the_targets_own_text(seed, decision, num_stages, accuracy, prompt, num_tokens):
    rng = random.Random(seed)
    network = ToyNetwork(
        prompt=prompt,
        num_tokens=num_tokens,
        num_stages=num_stages,
        decision=decision,
        drafts=drafter(accuracy, rng),
        choose=rng.randrange,
    )
    assert network.run() == plain_text(prompt, num_tokens)
    assert network.finish is not None
    assert network.finish.reason == "length"
    assert network.finish.error is None
    while network.step():
        pass
    sent_windows = [e.message for e in network.trace if isinstance(e, Send) and isinstance(e.message, Window)]
    assert [w.window for w in sent_windows] == list(range(len(sent_windows)))
    assert any(isinstance(e, Draft) for e in network.trace) == (decision.mode is not Mode.PLAIN and num_tokens > 1)
