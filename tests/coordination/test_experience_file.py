"""What one process measured of a route, the next begins with; a broken file costs nothing but that."""

import math

import msgspec
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import plain_text
from toy_drafts import TREE
from toy_swarm import toy_swarm

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.coordination.experience_file import ExperienceFile
from dsd_p2p.coordination.hints import SharedExperience
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.types import StageCost, TextRequest
from dsd_p2p.window.base import Mode
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN
from dsd_p2p.window.tracker import Tracker

PROMPT = [1, 2, 3]
NAME = ("", "toy", "model", "stage0 [0, 1)")


def measured(num=40):
    tracker = Tracker()
    for index in range(num):
        tracker.verdict(
            traversal_s=0.2,
            costs=[StageCost(us=20_000 + 500 * (index % 5), num_rows=1 + index % 5)] * 3,
            waited_s=0.001,
        )
        tracker.draft_step(1 + index % 3, 0.015)
        tracker.outcome(0 if index % 4 else None, [-0.2, -2.0])
        tracker.progress(PLAIN if index < 10 else TREE, 2, 0.1)
    return tracker


def test_the_next_tracker_sees_what_the_last_one_saw(tmp_path):
    file = ExperienceFile(tmp_path / "experience")
    tracker, begun = measured(), Tracker()
    file.keep(NAME, tracker.kept())
    begun.begin(file.of(NAME))
    before, after = tracker.observe(), begun.observe()
    assert after.links_s == before.links_s
    # The slope leans on its prior again, a little.
    for new, old in zip(after.stages, before.stages, strict=True):
        assert math.isclose(new.at(3), old.at(3), rel_tol=0.01)
    assert math.isclose(after.draft.at(2), before.draft.at(2), rel_tol=0.01)
    assert abs(after.hit_rate_by_rank[0] - before.hit_rate_by_rank[0]) < 0.1
    assert after.measured.keys() == before.measured.keys()
    for kind, rate in before.measured.items():
        assert math.isclose(after.measured[kind].tokens_per_s, rate.tokens_per_s)
    assert file.of(("another",)) is None


def test_new_measurements_outweigh_kept_ones(tmp_path):
    begun = Tracker()
    begun.begin(measured().kept())
    for _ in range(40):
        begun.verdict(traversal_s=0.05, costs=[StageCost(us=2_000, num_rows=1)] * 3, waited_s=0.0)
    assert begun.observe().traversal_s(1) < 0.08


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_a_broken_file_costs_only_experience(tmp_path_factory, damage):
    file = ExperienceFile(tmp_path_factory.mktemp("x") / "experience")
    file.keep(NAME, measured().kept())
    whole = file._path.read_bytes()
    file._path.write_bytes(damage + whole[len(damage) :])
    kept = file.of(NAME)
    if kept is not None:
        begun = Tracker()
        begun.begin(kept)
        begun.observe()
    file.keep(NAME, measured().kept())
    assert file.of(NAME) is not None


def test_numbers_that_are_none_are_left_out_and_the_file_stays_small(tmp_path):
    file = ExperienceFile(tmp_path / "experience")
    file.keep(NAME, msgspec.structs.replace(measured().kept(), links_s=math.nan))
    assert file.of(NAME) is None
    for number in range(80):
        file.keep((str(number),), measured(12).kept())
    assert file.of(("0",)) is None
    assert file.of(("79",)) is not None
    ExperienceFile(tmp_path / "no" / "such" / "folder").keep(NAME, measured().kept())


async def test_the_first_answer_after_a_restart_begins_where_the_last_ended(tmp_path):
    """The same text, and no plain window at the start."""
    modes = []
    for _ in range(2):
        async with toy_swarm(link=LinkModel(latency_s=0.02)) as swarm:
            swarm.engine.experience = SharedExperience(tmp_path / "experience", swarm.engine.links, list)
            policy = adaptive_policy("learned", frozenset({Mode.CONTINUOUS}))
            options = GenerateOptions(text=TextRequest(max_tokens=120))
            with trio.fail_after(60):
                async with swarm.engine.generate(PROMPT, options, policy) as generation:
                    modes.append(generation.decision.mode)
                    assert [token async for token in generation] == plain_text(PROMPT, 120)
                while not (tmp_path / "experience").exists():  # noqa: ASYNC110 - a file
                    await trio.sleep(0.01)
    assert modes == [Mode.PLAIN, Mode.CONTINUOUS]
