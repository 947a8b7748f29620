"""How `dsd bench wan` compares policies with fixed windows."""

import msgspec
import pytest

from dsd_p2p.coordination.statistics import AnswerStatistics, RequestDetails
from dsd_p2p.session.request import RequestStats
from dsd_p2p.session.timing import Timing
from dsd_p2p.window.static import PLAIN
from node.cli.main import main
from node.lab.benches.arms import ArmRuns
from node.lab.benches.wan import _finalists, _regret
from node.lab.config import WanConfig
from node.lab.simulator.fit import MeasuredRun


def arm(*tokens_per_s):
    runs = ArmRuns()
    for number, speed in enumerate(tokens_per_s, start=1):
        timing = Timing(started_at_s=0.0)
        timing.arrived(1, 1.0)
        timing.arrived(100, 1.0 + 100 / speed)
        runs.add(number, {"problem": "p1", "category": "chat"}, AnswerStatistics(timing=timing))
    return runs


def test_the_simulator_can_be_fitted_to_the_rows_of_a_receipt():
    """`dsd sim compare` reads what `dsd bench wan` writes: each answer's prompt, times and counts."""
    timing = Timing(started_at_s=0.0)
    timing.arrived(1, 1.0)
    details = RequestDetails(
        drafter="ngram",
        decision=PLAIN,
        is_relaxed=False,
        finish_reason="length",
        num_prompt_tokens=7,
        mean_accepted_length=1.0,
        bytes_per_token=9.0,
        mean_stage_s=[0.005],
        mean_draft_step_s=0.0,
        counts=RequestStats(),
        num_checks=None,
        num_unchecked=None,
        is_checked=None,
    )
    runs = ArmRuns()
    runs.add(0, {"problem": "mt-bench-81", "category": "chat"}, AnswerStatistics(timing=timing, details=details))
    (run,) = msgspec.json.decode(msgspec.json.encode(runs.rows()), type=list[MeasuredRun])
    assert (run.problem, run.num_prompt_tokens, run.ttft_s, run.decision) == ("mt-bench-81", 7, 1.0, PLAIN)


SWEPT = {"plain": arm(5), "sync-4": arm(20), "sync-8": arm(30), "continuous-2x8-6": arm(25), "learned": arm(99)}


@pytest.mark.parametrize(
    ("finalists", "expected"),
    [
        (1, ["plain", "sync-8", "learned"]),
        (2, ["plain", "sync-8", "continuous-2x8-6", "learned"]),
        (9, ["plain", *SWEPT]),
    ],
)
def test_the_fastest_windows_go_on_beside_plain_and_the_policies(finalists, expected):
    chosen = _finalists(SWEPT, WanConfig(policies=("learned",), finalists=finalists))
    assert sorted(chosen) == sorted(set(expected))
    assert chosen[0] == "plain"


def test_regret_is_of_all_answers_and_a_policy_is_no_fixed_window():
    """Each round has a text of its own; here the policy answers two of three as fast, and the hardest at half the speed."""
    runs = {"plain": arm(5, 5, 5), "sync-8": arm(40, 10, 40), "learned": arm(40, 5, 40), "analytic": arm(20, 20, 20)}
    regret = _regret(runs, WanConfig(policies=("learned", "analytic"), finalists=1))
    assert regret == pytest.approx({"learned": 0.4, "analytic": 0.0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "wan", "--links", "5ms,999999s"], "at most 8s"),
        (["bench", "wan", "--finalists", "99"], "see `dsd bench wan --help`"),
        (["demo", "--max-tokens", "0"], "see `dsd demo --help`"),
    ],
)
def test_what_is_out_of_bounds_is_refused_before_anything_starts(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
