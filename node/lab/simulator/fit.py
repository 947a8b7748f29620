"""Fits the simulator to a measured cell and predicts the other cells (`dsd sim compare`).

The fit uses the first cell of a `dsd bench wan --record` receipt. Its service times are the seconds of a layer's pass
by number of positions, the tail's extra time, the draft step, and the cost of a hop beyond its link. They come from the
arms in which only one process works at a time.

Five parameters do not show there (`_KNOBS`): what several processes at once gain from the machine's cores, how much of
a hop's cost is work at the stage and at the coordinator, the weight of a draft step, and the cost of a draft step over
many stems. The fit chooses them so that its predictions for all arms of that cell come closest to the measurements.

The other cells, with other links and numbers of stages, are held out: the predictions use only their description and
texts.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType
from typing import Any

import msgspec

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.sim.agreement import RecordedText
from dsd_p2p.sim.answer import RecordedAnswer
from dsd_p2p.sim.route import RouteModel, SimulatedRequest, simulate_request
from dsd_p2p.sim.service import PassCost
from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import StaticPolicy, sync_chain
from dsd_p2p.window.tracker import Tracker

_VOCAB_SIZE = 1 << 31
_KNOBS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "worth": (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0),
        "coordinator_share": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        "handled_share": (0.0, 0.5, 1.0, 1.5, 2.0),
        "draft_weight": (1.0, 2.0, 4.0),
        "many_stems": (0.0, 0.8, 1.0, 1.2, 1.4),
    }
)
"""The parameters that a receipt does not show, with the values to try; `_adjusted` applies them."""

_STARTS = ((0.8, 1.0, 0.0, 1.0, 0.0), (0.8, 3.0, 1.0, 2.0, 0.0), (0.65, 1.0, 0.0, 4.0, 0.0))
"""Start values of the parameters, in the order of `_KNOBS`."""

_ROUNDS = 4

_TTFT_WEIGHT = 0.25
"""Weight of the error in the first token's time relative to speed: it is one event, speed averages dozens."""

_READING_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Values to try for the drafter's time to read a prompt, as a share of the target's time."""


class MeasuredRun(msgspec.Struct):
    """One answer of one arm, in the form that receipts keep."""

    problem: str
    decision: Decision
    num_prompt_tokens: int
    num_tokens: int
    num_later_tokens: int
    later_s: float
    ttft_s: float
    mean_stage_s: list[float]
    mean_draft_step_s: float
    counts: dict[str, Any]


class MeasuredCell(msgspec.Struct):
    """One cell of a receipt: a model, a number of stages and one kind of link."""

    model: str
    stages: int
    link: str
    runs: dict[str, list[MeasuredRun]]
    recorded: dict[str, RecordedText] | None = None
    num_layers: int = 30

    @property
    def link_s(self) -> float:
        """The one-way latency of the link."""
        return units.seconds(self.link)


class _Results(msgspec.Struct):
    cells: list[MeasuredCell]


class _Machine(msgspec.Struct):
    cores: int


class MeasuredReceipt(msgspec.Struct):
    """The parts of a receipt that the fit reads."""

    benchmark: str
    machine: _Machine
    results: _Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One arm of one cell. Speeds in tokens a second, time to the first token (TTFT) in seconds."""

    stages: int
    link: str
    arm: str
    is_held_out: bool
    measured: float
    predicted: float
    measured_ttft_s: float
    predicted_ttft_s: float

    @property
    def error(self) -> float:
        """The relative error of the predicted speed: predicted over measured, minus one."""
        return self.predicted / self.measured - 1

    @property
    def ttft_error(self) -> float:
        """The relative error of the predicted time to the first token."""
        return self.predicted_ttft_s / self.measured_ttft_s - 1


def compare(paths: Sequence[Path]) -> list[Comparison]:
    """Return a comparison for every arm of every usable cell of the receipts.

    Raises:
        ConfigError: no receipt is usable, or one has no plain decoding to fit to.
    """
    comparisons = [each for path in paths for each in _compare_receipt(path)]
    if not comparisons:
        names = ", ".join(map(str, paths))
        raise ConfigError(f"no receipt of `dsd bench wan --arms … --record` among {names}")
    return comparisons


def _compare_receipt(path: Path) -> Iterator[Comparison]:
    try:
        receipt = msgspec.json.decode(path.read_bytes(), type=MeasuredReceipt)
    except (OSError, msgspec.DecodeError):
        return
    cells = [cell for cell in receipt.results.cells if cell.recorded]
    cells = [cell for cell in cells if cell.model == cells[0].model]
    if receipt.benchmark != "wan" or not cells:
        return
    if not any(runs[0].decision.depth == 0 for runs in cells[0].runs.values()):
        raise ConfigError(
            f"{path} has no plain arm in its first cell, which the fit needs: make the receipt with dsd bench wan --arms"
        )
    profile = fit(cells[0], receipt.machine.cores)
    for cell in cells:
        for arm, (speed, ttft_s) in predict(profile, cell).items():
            runs = cell.runs[arm]
            yield Comparison(
                stages=cell.stages,
                link=cell.link,
                arm=arm,
                is_held_out=cell is not cells[0],
                measured=measured_speed(runs),
                predicted=speed,
                measured_ttft_s=median(run.ttft_s for run in runs),
                predicted_ttft_s=ttft_s,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The service times of one machine and model.

    layer: one layer's pass. tail: the extra time of the tail's pass. draft: one draft step. hop_s: the time that each
    link adds to its latency. handled_share: the share of it that is work at the stage behind the link.
    coordinator_share: the share of it by which a message delays the next draft. draft_weight: the weight of a draft
    step relative to a pass. cores: the cores that all stages and the drafter share. They also share memory, so it is
    less than the machine's number.
    """

    num_layers: int
    layer: PassCost
    tail: PassCost
    draft: PassCost
    hop_s: float
    handled_share: float
    coordinator_share: float
    draft_weight: float
    cores: float

    def route(self, num_stages: int, link_s: float) -> RouteModel:
        """Return a route of `num_stages` stages with even spans."""
        spans = even_spans(self.num_layers, num_stages)
        stages = [self.layer.scaled(last - first) for first, last in spans]
        stages[-1] = _sum(stages[-1], self.tail)
        return RouteModel(
            stages=tuple(stages),
            link=LinkModel(latency_s=link_s + self.hop_s * max(0.0, 1 - self.handled_share)),
            draft=self.draft,
            cores=self.cores,
            draft_weight=self.draft_weight,
            handling_s=self.hop_s * self.handled_share,
            coordinator_s=self.hop_s * self.coordinator_share,
        )


def fit(cell: MeasuredCell, cores: int) -> Profile:
    """Return the service times that fit a cell best.

    The search changes one parameter at a time for as long as that helps. It starts from several points, because the
    sharing of scarce cores and the cost of messages can compensate for each other.
    """
    measured = _measured(cell, cores)
    many = max(run.decision.expand_nodes for runs in cell.runs.values() for run in runs)

    def adjusted(knobs: tuple[float, ...]) -> Profile:
        return _adjusted(measured, many, dict(zip(_KNOBS, knobs, strict=True)))

    @cache
    def misfit(knobs: tuple[float, ...]) -> float:
        return _misfits(adjusted(knobs), cell)[0]

    def misfit_with_ttft(profile: Profile) -> float:
        speed, ttft = _misfits(profile, cell)
        return speed + _TTFT_WEIGHT * ttft

    profiles = [_with_prefill(adjusted(_turned(start, misfit)), cell) for start in _STARTS]
    candidates = (_reading(profile, cell, share) for profile in profiles for share in _READING_SHARES)
    return min(candidates, key=misfit_with_ttft)


def _turned(start: tuple[float, ...], misfit: Callable[[tuple[float, ...]], float]) -> tuple[float, ...]:
    """Set each parameter in turn to its best value, until none changes or `_ROUNDS` are over."""
    knobs = start
    for _ in range(_ROUNDS):
        before = knobs
        for index, values in enumerate(_KNOBS.values()):
            knobs = min(((*knobs[:index], value, *knobs[index + 1 :]) for value in values), key=misfit)
        if knobs == before:
            break
    return knobs


def _adjusted(profile: Profile, many: int, knobs: Mapping[str, float]) -> Profile:
    return replace(
        profile,
        handled_share=knobs["handled_share"],
        coordinator_share=knobs["coordinator_share"],
        draft_weight=knobs["draft_weight"],
        cores=profile.cores * knobs["worth"],
        draft=_bent(profile.draft, many, knobs["many_stems"]),
    )


def _bent(draft: PassCost, num_stems: int, factor: float) -> PassCost:
    """Return the curve with one more point: `num_stems` stems cost `factor` times what the curve predicts for them."""
    if num_stems <= draft.nodes[-1]:
        return draft
    seconds = max(draft.seconds[-1], factor * draft.at(num_stems))
    return PassCost(nodes=(*draft.nodes, num_stems), seconds=(*draft.seconds, seconds))


def _with_prefill(profile: Profile, cell: MeasuredCell) -> Profile:
    """Scale the curve beyond the sizes of windows so that plain decoding's first token comes when it was measured."""
    arm, plain = next((arm, runs) for arm, runs in cell.runs.items() if runs[0].decision.depth == 0)
    links_s = (cell.stages + 1) * (cell.link_s + profile.hop_s)
    wanted_s = median(run.ttft_s for run in plain) - links_s
    factor = wanted_s / (predict(profile, cell)[arm][1] - links_s)
    nodes, largest = profile.layer.nodes, max(run.decision.window_nodes for runs in cell.runs.values() for run in runs)
    seconds = [s * factor if n > largest else s for n, s in zip(nodes, profile.layer.seconds, strict=True)]
    return replace(profile, layer=PassCost(nodes=nodes, seconds=tuple(itertools.accumulate(seconds, max))))


def _reading(profile: Profile, cell: MeasuredCell, share: float) -> Profile:
    """Let the drafter read a prompt in `share` of the time that the target takes for it."""
    draft = profile.draft
    lengths = sorted(
        {run.num_prompt_tokens for runs in cell.runs.values() for run in runs} - {*range(draft.nodes[-1] + 1)}
    )
    seconds = [share * profile.num_layers * profile.layer.at(count) for count in lengths]
    curve = itertools.accumulate([*draft.seconds, *seconds], max)
    return replace(profile, draft=PassCost(nodes=(*draft.nodes, *lengths), seconds=tuple(curve)))


def _misfits(profile: Profile, cell: MeasuredCell) -> tuple[float, float]:
    """Return the squared logarithmic errors, summed over the arms: of the speed and of the time to the first token."""
    predicted = [(cell.runs[arm], speed, ttft_s) for arm, (speed, ttft_s) in predict(profile, cell).items()]
    return (
        sum(math.log(speed / measured_speed(runs)) ** 2 for runs, speed, _ in predicted),
        sum(math.log(ttft_s / median(run.ttft_s for run in runs)) ** 2 for runs, _, ttft_s in predicted),
    )


def measured_speed(runs: Sequence[MeasuredRun]) -> float:
    """Return the tokens a second of one arm: all its tokens over all their time."""
    return sum(run.num_later_tokens for run in runs) / sum(run.later_s for run in runs)


def _measured(cell: MeasuredCell, cores: int) -> Profile:
    """Return the service times shown by the arms in which only one process works at a time."""
    num_layers = cell.num_layers
    spans = even_spans(num_layers, cell.stages)
    layers = [last - first for first, last in spans]
    layer_points: dict[int, list[float]] = {}
    tail_points: dict[int, list[float]] = {}
    draft_points: dict[int, list[float]] = {}
    for runs in cell.runs.values():
        for run in runs:
            if run.decision.max_in_flight > 1:
                continue
            # The size of the windows after the prompt's: the root and the nodes drafted below it.
            size = max(1, run.decision.window_nodes)
            per_layer = [seconds / count for seconds, count in zip(run.mean_stage_s, layers, strict=True)]
            shared = mean(per_layer[:-1]) if len(per_layer) > 1 else per_layer[0]
            layer_points.setdefault(size, []).append(shared)
            tail_points.setdefault(size, []).append(max(0.0, run.mean_stage_s[-1] - shared * layers[-1]))
            if run.mean_draft_step_s:
                draft_points.setdefault(run.decision.expand_nodes, []).append(run.mean_draft_step_s)
    plain = next(runs for runs in cell.runs.values() if runs[0].decision.depth == 0)
    traversal_s = 1 / measured_speed(plain)
    stages_s = mean(sum(run.mean_stage_s) for run in plain)
    num_links = cell.stages + 1
    hop_s = max(0.0, (traversal_s - stages_s) / num_links - cell.link_s)
    # The first verdict needs all of the prompt except its last token, and then that token at the tail.
    for run in plain:
        prefill_s = run.ttft_s - num_links * (cell.link_s + hop_s) - run.mean_stage_s[-1]
        layer_points.setdefault(run.num_prompt_tokens - 1, []).append(max(0.0, prefill_s) / num_layers)
    layer = _curve(layer_points)
    return Profile(
        num_layers=num_layers,
        layer=layer,
        tail=_curve(tail_points),
        draft=_curve(draft_points),
        hop_s=hop_s,
        handled_share=0.0,
        coordinator_share=0.0,
        draft_weight=1.0,
        cores=cores,
    )


def predict(profile: Profile, cell: MeasuredCell) -> dict[str, tuple[float, float]]:
    """Return each arm's tokens a second and seconds to the first token, by simulating the cell.

    The cell's measured times are not used.
    """
    assert cell.recorded is not None
    route = profile.route(cell.stages, cell.link_s)
    tracker = Tracker()
    first = next(iter(cell.recorded.values()))
    simulate_request(RecordedAnswer(first, 1, _VOCAB_SIZE), route, StaticPolicy(sync_chain(8)), tracker, 24)
    results: dict[str, list[SimulatedRequest]] = {arm: [] for arm in cell.runs}
    num_runs = max(len(runs) for runs in cell.runs.values())
    for number in range(num_runs):
        for arm, runs in cell.runs.items():
            run = runs[number]
            results[arm].append(
                simulate_request(
                    RecordedAnswer(cell.recorded[run.problem], run.num_prompt_tokens, _VOCAB_SIZE),
                    route,
                    StaticPolicy(run.decision),
                    tracker,
                    run.num_tokens,
                    num_prompt_tokens=run.num_prompt_tokens,
                )
            )
    return {
        arm: (_speed(requests), median(each.arrivals[0][0] for each in requests)) for arm, requests in results.items()
    }


def _speed(requests: Sequence[SimulatedRequest]) -> float:
    num_tokens = sum(len(request.tokens) - request.arrivals[0][1] for request in requests)
    return num_tokens / sum(request.arrivals[-1][0] - request.arrivals[0][0] for request in requests)


def _curve(points: dict[int, list[float]]) -> PassCost:
    """Return the medians by number of positions, made monotonic: a larger pass never takes less time."""
    nodes = tuple(sorted(points))
    seconds: list[float] = []
    for count in nodes:
        seconds.append(max([median(points[count]), *seconds[-1:]]))
    return PassCost(nodes=nodes, seconds=tuple(seconds))


def _sum(a: PassCost, b: PassCost) -> PassCost:
    nodes = tuple(sorted({*a.nodes, *b.nodes}))
    return PassCost(nodes=nodes, seconds=tuple(a.at(n) + b.at(n) for n in nodes))
