"""The tracker's estimates and the analytic policy's choices against a world whose costs are known."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd_p2p.types import StageCost
from dsd_p2p.window.analytic import AnalyticPolicy, predicted_tokens_per_s
from dsd_p2p.window.base import CostLine, MeasuredRate, Mode, Observation
from dsd_p2p.window.governor import Governor
from dsd_p2p.window.static import PLAIN, continuous_tree, sync_chain, sync_tree, usual_tree
from dsd_p2p.window.tracker import LineFit, Tracker

STAGE = CostLine(fixed_s=0.01, per_node_s=0.001)
DRAFT = CostLine(fixed_s=0.01, per_node_s=0.0)


def world(*, links_s, stage=STAGE, num_stages=3, draft_s=0.005, agreement=0.8):
    return Observation(
        stages=(stage,) * num_stages,
        links_s=links_s,
        draft=CostLine(fixed_s=draft_s, per_node_s=0.0),
        hit_rate_by_rank=(agreement, agreement * (1 - agreement) / 2, agreement * (1 - agreement) / 4),
        num_outcomes=100,
    )


@pytest.mark.parametrize("sizes", [(1, 32), range(1, 33)], ids=["two", "many"])
@given(fixed=st.floats(0.001, 0.1), slope=st.floats(0, 0.01), seed=st.integers(0, 1000))
def test_a_line_is_found_again(sizes, fixed, slope, seed):
    fit, rng = LineFit(), random.Random(seed)
    for _ in range(80):
        size = rng.choice(sizes)
        fit.add(size, fixed + slope * size)
    line = fit.line()
    assert line.per_node_s == pytest.approx(slope, abs=0.05 * (0.03 * fixed + slope))
    assert line.fixed_s == pytest.approx(fixed, abs=0.05 * 17 * (0.03 * fixed + slope))


@given(cost=st.floats(0.001, 0.1), size=st.integers(1, 32))
def test_passes_of_one_size_tell_their_cost_and_leave_the_usual_slope(cost, size):
    fit = LineFit()
    for _ in range(5):
        fit.add(size, cost)
    line = fit.line()
    assert line.at(size) == pytest.approx(cost)
    assert line.per_node_s == pytest.approx(0.03 * line.fixed_s)


def test_a_slope_that_one_disturbed_pass_suggested_is_forgotten():
    fit = LineFit()
    fit.add(8, 0.4)
    for _ in range(150):
        fit.add(1, 0.02)
    assert fit.line().at(8) == pytest.approx(0.02 * (1 + 7 * 0.03), rel=0.05)


def test_the_tracker_measures_what_it_is_shown():
    tracker, rng = Tracker(), random.Random(2)
    for _ in range(200):
        size = rng.randrange(1, 16)
        # One slope is the usual one, the other three times as steep.
        stage_s = [0.01 + 0.0003 * size, 0.02 + 0.002 * size]
        queueing_s = rng.random() * 0.05
        costs = [StageCost(us=round(seconds * 1e6), num_rows=size) for seconds in stage_s]
        tracker.verdict(traversal_s=0.2 + sum(stage_s) + queueing_s, costs=costs, waited_s=queueing_s)
        tracker.draft_step(size, 0.02 + 0.002 * size)
        tracker.outcome(rng.choices([0, 1, None], weights=[7, 2, 1])[0], (-0.4, -1.6))
    observation = tracker.observe()
    usual, steep = observation.stages
    assert (usual.fixed_s, usual.per_node_s) == pytest.approx((0.01, 0.0003), rel=0.01)
    assert (steep.fixed_s, steep.per_node_s) == pytest.approx((0.02, 0.002), rel=0.1)
    assert observation.links_s == pytest.approx(0.2, abs=1e-3)
    assert observation.queue_s == pytest.approx(0.025, abs=0.015)
    assert (observation.draft.fixed_s, observation.draft.per_node_s) == pytest.approx((0.02, 0.002), rel=0.1)
    assert observation.hit_rate_by_rank[0] == pytest.approx(0.7, abs=0.08)
    assert observation.hit_rate_by_rank[1] == pytest.approx(0.2, abs=0.08)


def test_predictions_are_those_of_the_latency_model():
    observation = world(links_s=0.2)
    assert predicted_tokens_per_s(PLAIN, observation) == pytest.approx(1 / (0.2 + 3 * 0.011))
    tokens = sum(0.8**k for k in range(5))
    assert predicted_tokens_per_s(sync_chain(4), observation) == pytest.approx(tokens / (4 * 0.005 + 0.2 + 3 * 0.015))
    chain = continuous_tree(depth=8, width=1, window_nodes=1, max_in_flight=64)
    pace_s = observation.pace_s(1)
    assert pace_s > observation.slowest_stage_s(1) == pytest.approx(0.011), "no queue at the slowest stage"
    assert predicted_tokens_per_s(chain, observation) == pytest.approx(5 / (0.2 + 3 * 0.011 + 4 * pace_s))


def test_a_draft_step_over_many_stems_costs_what_it_was_seen_to_cost():
    """A wide tree catches more, but every level of it takes a step over a dozen nodes."""
    narrow, wide = (usual_tree(width, nodes, 128) for width, nodes in ((4, 8), (12, 16)))
    rates = (0.8, 0.1, 0.04, 0.02, *(0.003,) * 12)

    def lead(per_stem_s):
        draft = CostLine(fixed_s=0.03, per_node_s=per_stem_s)
        observation = replace(world(links_s=0.1), draft=draft, hit_rate_by_rank=rates)
        return predicted_tokens_per_s(wide, observation) / predicted_tokens_per_s(narrow, observation)

    assert lead(0.0) > 1.05
    assert lead(0.002) < 0.95


@pytest.mark.parametrize(
    ("observation", "mode"),
    [
        (world(links_s=0.2, agreement=0.95), Mode.CONTINUOUS),
        (world(links_s=0.2, agreement=0.0), Mode.PLAIN),
        (world(links_s=0.0, draft_s=0.05, agreement=0.8), Mode.PLAIN),
    ],
)
def test_it_chooses_what_the_world_favours(observation, mode):
    policy = AnalyticPolicy()
    policy.decide(Observation())
    assert policy.decide(observation).mode is mode


@given(
    links_s=st.floats(0, 1),
    draft_s=st.floats(0, 0.2),
    agreement=st.floats(0, 1),
    slope=st.floats(0, 0.05),
    allow=st.sampled_from([{Mode.SYNC}, {Mode.CONTINUOUS}, {Mode.SYNC, Mode.CONTINUOUS}]),
)
def test_it_never_chooses_what_it_predicts_to_be_slower_than_plain(links_s, draft_s, agreement, slope, allow):
    observation = world(
        links_s=links_s, draft_s=draft_s, agreement=agreement, stage=CostLine(fixed_s=0.01, per_node_s=slope)
    )
    decision = AnalyticPolicy(frozenset(allow)).decide(observation)
    assert decision.mode in {Mode.PLAIN, *allow}
    assert predicted_tokens_per_s(decision, observation) >= predicted_tokens_per_s(PLAIN, observation)


def test_it_keeps_its_decision_while_another_is_hardly_better():
    policy = AnalyticPolicy(frozenset({Mode.SYNC}))
    first = policy.decide(world(links_s=0.2, agreement=0.8))
    assert policy.decide(world(links_s=0.2, agreement=0.81)) is first
    assert policy.decide(world(links_s=0.2, agreement=0.98)) is not first


@pytest.mark.parametrize("gain", [0.4, 0.9, 1.2, 2.0])
@pytest.mark.parametrize("num_requests", [2, 5, 16])
def test_the_governor_keeps_what_serves_all_requests_best(gain, num_requests):
    """Plain decoding writes 50 tokens/s in all, speculation `gain` times as many: never long at what is worse."""
    governor, now_s, written = Governor(), 0.0, 0.0
    for _ in range(num_requests):
        governor.joined(now_s)
    for _ in range(3000):
        now_s += 0.1
        rate = 50 * (gain if governor.allows(now_s) else 1.0)
        written += rate * 0.1
        governor.committed(round(rate * 0.1), now_s)
    assert governor.allows(now_s) == (gain > 1)
    assert written >= 0.97 * 300 * 50 * max(1.0, gain)
    assert str(num_requests) in governor.reason()


def test_the_governor_leaves_a_single_request_alone_and_notices_change():
    governor, now_s = Governor(), 0.0
    governor.joined(now_s)
    for _ in range(100):
        now_s += 0.1
        governor.committed(1, now_s)
        assert governor.allows(now_s)
    for _ in range(15):
        governor.joined(now_s)
    seen = []
    for step in range(12000):
        now_s += 0.1
        is_better = step > 3000
        rate = (40 if is_better else 5) if governor.allows(now_s) else 20
        seen.append(governor.allows(now_s))
        governor.committed(round(rate * 0.1), now_s)
    # First speculation is worse, then it becomes better: seen within the longest wait for another trial.
    assert seen[:3000].count(False) > 2900
    assert seen[-3000:].count(True) > 2900
    for _ in range(15):
        governor.left(now_s)
    assert governor.allows(now_s)


def test_a_frame_that_was_lost_once_does_not_lengthen_the_links():
    tracker = Tracker()
    for number in range(60):
        tracker.verdict(
            traversal_s=0.05 + 0.01 + (number == 40), costs=[StageCost(us=10_000, num_rows=1)], waited_s=0.0
        )
    assert tracker.observe().links_s == pytest.approx(0.05, rel=0.05)


def test_two_early_misses_condemn_no_drafter():
    tracker = Tracker()
    for _ in range(2):
        tracker.outcome(None, (-0.4, -1.6))
    assert tracker.observe().hit_rate_by_rank[0] > 0.5
    for _ in range(60):
        tracker.outcome(None, (-0.4, -1.6))
    assert tracker.observe().hit_rate_by_rank[0] < 0.1


@pytest.mark.parametrize(
    "decision", [sync_tree(4, depth=2), sync_tree(8, depth=4), sync_tree(16, depth=6), sync_chain(5)]
)
def test_a_synchronous_window_is_rated_by_the_paths_that_it_can_hold(decision):
    """The likeliest nodes of the tree of all candidates, by brute force."""
    rates = (0.6, 0.2, 0.1, 0.05)[: decision.width]
    observation = Observation(
        stages=(CostLine(fixed_s=0.01, per_node_s=0.001),), links_s=0.1, draft=DRAFT, hit_rate_by_rank=rates
    )
    paths = [
        math.prod(path) for depth in range(1, decision.depth + 1) for path in itertools.product(rates, repeat=depth)
    ]
    best = sorted(paths, reverse=True)[: decision.window_nodes - 1]
    num_nodes = decision.window_nodes
    seconds = decision.depth * 0.01 + 0.1 + 0.01 + 0.001 * num_nodes
    assert predicted_tokens_per_s(decision, observation) == pytest.approx((1 + sum(best)) / seconds)


def test_at_a_busy_stage_a_round_is_a_whole_number_of_passes():
    def seconds(draft_s, num_sharing):
        observation = Observation(
            stages=(CostLine(fixed_s=0.04, per_node_s=0.0),),
            num_sharing=num_sharing,
            links_s=0.01,
            draft=CostLine(fixed_s=draft_s, per_node_s=0.0),
            hit_rate_by_rank=(0.0,),
        )
        return 1 / predicted_tokens_per_s(sync_chain(4), observation)

    # Four drafts of 6 ms and 10 ms on the way come back before the next pass has begun to end; four of 9 ms do not.
    assert seconds(0.006, 1e9) == pytest.approx(0.08, rel=0.02)
    assert seconds(0.009, 1e9) == pytest.approx(0.12, rel=0.02)
    assert seconds(0.006, 1) == pytest.approx(0.074)
    assert seconds(0.006, 1) < seconds(0.006, 2) < seconds(0.006, 1e9)


def test_speculation_that_was_hardly_measured_is_tried_whatever_it_promises():
    policy = AnalyticPolicy()
    dear = (CostLine(fixed_s=0.01, per_node_s=0.5),)

    def seen(num_plain, **others):
        rate = MeasuredRate(decision=PLAIN, tokens_per_s=2.0, num_tokens=num_plain)
        return Observation(stages=dear, draft=DRAFT, hit_rate_by_rank=(0.5,), measured={PLAIN.kind: rate, **others})

    assert policy.decide(seen(10)).mode is Mode.PLAIN
    trial = policy.decide(seen(24))
    assert trial.mode is not Mode.PLAIN
    assert "hardly measured" in trial.reason
    unlucky = MeasuredRate(decision=trial, tokens_per_s=0.5, num_tokens=3)
    assert AnalyticPolicy().decide(seen(24, **{trial.kind: unlucky})).mode is not Mode.PLAIN, (
        "three tokens tell nothing"
    )
    tried = MeasuredRate(decision=trial, tokens_per_s=0.5, num_tokens=14)
    assert policy.decide(seen(24, **{trial.kind: tried})).mode is Mode.PLAIN, "it was no better"
    assert policy.decide(seen(90, **{trial.kind: tried})).mode is Mode.PLAIN, "and is not tried again soon"
