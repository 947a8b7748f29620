"""The live core in virtual time on recorded agreement: what speculation gains, and that it never costs much. No clock is read."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_routes import ROUTES, TEXTS, Perfect, Useless, route_of, tokens_per_s, write

from dsd_p2p.sim.answer import RecordedAnswer
from dsd_p2p.sim.route import simulate_request
from dsd_p2p.sim.service import PassCost
from dsd_p2p.window.analytic import AnalyticPolicy
from dsd_p2p.window.base import Decision, Mode
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain, sync_tree
from dsd_p2p.window.tracker import Tracker
from node.lab.benches.ring import choose_arms


def test_plain_decoding_takes_one_traversal_a_token(trace):
    rate = tokens_per_s(trace, route_of(), lambda: StaticPolicy(PLAIN))
    assert rate == pytest.approx(1 / (5 * 0.05 + 4 * 0.005), rel=1e-6)


@pytest.mark.parametrize(("num_stages", "least_ratio"), [(4, 10), (8, 12)])
def test_the_tree_turns_latency_into_throughput(trace, num_stages, least_ratio):
    chain = route_of(num_stages)
    arms = choose_arms(trace, chain, list(TEXTS), 96)
    rates = {name: tokens_per_s(trace, chain, lambda d=decision: StaticPolicy(d)) for name, decision in arms.items()}
    assert rates["continuous_tree"] >= least_ratio * rates["plain"]
    assert rates["continuous_tree"] >= 2 * rates["sync_chain"]
    assert rates["continuous_tree"] > rates["continuous_chain"] > rates["sync_chain"] > 3 * rates["plain"]


DECISIONS = st.one_of(
    st.just(PLAIN),
    st.builds(sync_chain, st.integers(1, 20)),
    st.builds(sync_tree, st.integers(4, 40), st.integers(1, 8)),
    st.builds(
        continuous_tree,
        depth=st.integers(1, 60),
        width=st.integers(1, 12),
        window_nodes=st.integers(1, 24),
        max_in_flight=st.integers(1, 60),
        min_path_prob=st.sampled_from([0.0, 0.001, 0.05]),
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    decision=DECISIONS,
    text=st.integers(0, 35),
    num_stages=st.integers(1, 6),
    link_s=st.floats(0, 0.2),
    stage_s=st.floats(0.0001, 0.05),
    draft_s=st.floats(0.0001, 0.05),
)
def test_any_window_writes_the_recorded_text(trace, decision, text, num_stages, link_s, stage_s, draft_s):
    chain = route_of(num_stages, link_s=link_s, stage_s=stage_s, draft_s=draft_s)
    request = write(trace, text, chain, StaticPolicy(decision), Tracker(), 40)
    assert request.tokens == list(trace.texts[text].tokens[:40])
    assert sum(size for _, size in request.arrivals) == len(request.tokens)


def test_the_first_draft_reads_the_prompt(trace):
    chain = replace(route_of(), draft=PassCost.line(0.006, 0.001))
    short, long = (
        simulate_request(
            RecordedAnswer(trace.texts[0], size, trace.vocab_size),
            chain,
            StaticPolicy(sync_chain(4)),
            Tracker(),
            30,
            size,
        ).stats
        for size in (1, 101)
    )
    assert short.num_draft_steps == long.num_draft_steps
    assert long.draft_s - short.draft_s == pytest.approx(100 * 0.001)


@pytest.mark.parametrize("chain", ROUTES)
def test_a_useless_drafter_costs_next_to_nothing(trace, chain):
    """What is found out in the first request is remembered for the chain; even finding out is cheap."""
    plain = tokens_per_s(trace, chain, lambda: StaticPolicy(PLAIN))
    tracker = Tracker()
    first = tokens_per_s(trace, chain, AnalyticPolicy, texts=(0,), drafts=Useless(), tracker=tracker)
    later = tokens_per_s(trace, chain, AnalyticPolicy, texts=(12, 24, 1, 13), drafts=Useless(), tracker=tracker)
    assert first >= 0.8 * plain
    assert later >= 0.97 * plain


@pytest.mark.parametrize("chain", ROUTES)
def test_a_perfect_drafter_is_put_to_use(trace, chain):
    plain = tokens_per_s(trace, chain, lambda: StaticPolicy(PLAIN))
    rate = tokens_per_s(trace, chain, AnalyticPolicy, drafts=Perfect())
    assert rate >= 0.97 * plain
    if chain.draft.at(1) < 0.5 * (plain**-1):
        assert rate > 2 * plain


def test_the_policy_explains_itself(trace):
    request = write(trace, 0, route_of(), AnalyticPolicy(), Tracker(), 64)
    assert request.stats.decisions
    assert all("tokens/s expected" in line or "trial" in line for line in request.stats.decisions)


def test_windows_keep_the_pace_of_the_slowest_stage(trace):
    """Windows do not queue at a stage in front of better ones: neither at a request's start nor while no pace is known."""
    decision = Decision(
        mode=Mode.CONTINUOUS, depth=64, width=8, expand_nodes=8, window_nodes=8, max_in_flight=512, max_nodes=896
    )
    chain = route_of(2, link_s=0.02, stage_s=0.03, draft_s=0.002)
    tracker = Tracker()
    for _ in range(2):
        write(trace, 0, chain, StaticPolicy(decision), tracker, 64)
        observation = tracker.observe()
        assert observation.links_s == pytest.approx(3 * 0.02, rel=0.01)
        assert observation.queue_s < 0.03


def test_the_slowest_stage_is_left_a_quarter_of_its_time(trace):
    """A chain that never misses and is drafted at once leaves one window after the other, as far apart as the pace says."""
    decision = continuous_tree(depth=64, width=1, window_nodes=1, max_in_flight=512)
    chain = route_of(2, link_s=0.02, stage_s=0.03, draft_s=0.002)
    request = write(trace, 0, chain, StaticPolicy(decision), Tracker(), 64, Perfect())
    assert request.stats.num_windows == 64
    assert (request.arrivals[-1][0] - request.arrivals[0][0]) / 63 == pytest.approx(1.3 * 0.03, rel=0.02)


def test_hits_are_counted_by_depth_rank_and_source(trace):
    stats = write(trace, 24, route_of(), StaticPolicy(choose_tree()), Tracker(), 96).stats
    assert sum(stats.hits_by_depth) == sum(stats.hits_by_rank) == sum(stats.hits_by_source.values())
    assert all(hits <= tries for hits, tries in zip(stats.hits_by_depth, stats.outcomes_by_depth, strict=True))
    assert stats.hits_by_rank[0] > 80
    assert sum(stats.sent_by_source.values()) > 80


def choose_tree():
    return continuous_tree(depth=64, width=8, window_nodes=16, max_in_flight=64, min_path_prob=0.001)
