"""Trains the learned window policy in the simulator (`scripts/train_policy`, docs/simulator.md).

Each scenario is a random route, drafter and kind of text; in some, several drafters share one target's passes. Every
window of the catalogue writes the same texts in it. The label is the logarithm of the window's speed over plain
decoding's. The inputs are what the live tracker would have observed under each of the windows.
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.sim.agreement import Agreement, read_agreement
from dsd_p2p.sim.answer import AgreementModel, Answer, ParametricAnswer, RecordedAnswer
from dsd_p2p.sim.fleet import Fleet
from dsd_p2p.sim.route import RouteModel, simulate_request
from dsd_p2p.sim.scenario import (
    Acceptance,
    Cost,
    DrafterPool,
    Length,
    Link,
    Scenario,
    Seconds,
    TargetPool,
    Workload,
)
from dsd_p2p.sim.service import PassCost
from dsd_p2p.telemetry.events import DecisionMade, decode_event
from dsd_p2p.window.base import Mode
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.learned.features import NAMES, features
from dsd_p2p.window.static import PLAIN, StaticPolicy
from dsd_p2p.window.tracker import Tracker
from node.lab.recorded import bundled_agreement
from node.lab.simulator.samples import Sample

_TOKENS = 40
_PLAIN_TOKENS = 12
_TEXTS = 2
_CROWDED_SHARE = 0.15
"""The share of scenarios in which several drafters share a target. In the others the drafter is alone."""

_CROWD_TOKENS = 40
_MIN_LIVE_TOKENS = 12
"""The fewest tokens that measure a live window well enough to learn from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, train and write the weights. Return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/train_policy", description=__doc__)
    parser.add_argument("--scenarios", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--live", type=Path, nargs="*", default=[], help="recordings of live runs to learn from also")
    parser.add_argument("--output", type=Path, default=Path("dsd_p2p/data/policy.npz"))
    options = parser.parse_args(arguments)
    samples = sweep(options.scenarios, options.seed, options.processes)
    samples += [sample for path in options.live for sample in read_live(path)]
    # Import torch only now: the simulations are forked without it.
    from node.lab.simulator.rater import train

    weights, losses = train(samples, options.epochs, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **weights)
    print(f"{options.output}: {len(samples)} scenarios, loss {losses[0]:.3f} trained, {losses[1]:.3f} held out")
    return 0


def read_live(path: Path) -> list[Sample]:
    """Return the samples of a recording (`--record`): the speeds of the measured windows over plain decoding's.

    Raises:
        ConfigError: the recording cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise ConfigError(f"recording {path}: {exc.strerror}") from exc
    samples = []
    for line in lines:
        event = decode_event(line)
        if isinstance(event, DecisionMade) and len(event.features) == len(NAMES):
            label = _live_label(event)
            if np.isfinite(label).sum() > 1:
                samples.append(Sample(inputs=np.array([event.features], np.float32), label=label))
    return samples


def _live_label(event: DecisionMade) -> NDArray[np.float32]:
    rates = {rate.kind: rate.tokens_per_s for rate in event.measured if rate.num_tokens >= _MIN_LIVE_TOKENS}
    label = np.full(len(CATALOGUE), np.nan, np.float32)
    if (plain := rates.get(PLAIN.kind, 0.0)) > 0:
        for index, decision in enumerate(CATALOGUE.values()):
            if (tokens_per_s := rates.get(decision.kind, 0.0)) > 0:
                label[index] = math.log(tokens_per_s / plain)
    return label


def sweep(num_scenarios: int, seed: int, num_processes: int) -> list[Sample]:
    """Simulate the scenarios on all cores. The same seed gives the same samples in the same order."""
    seeds = [f"{seed} {number}" for number in range(num_scenarios)]
    samples: list[Sample] = []
    start_s = time.monotonic()
    with multiprocessing.get_context("fork").Pool(num_processes, _load_trace) as pool:
        for sample in pool.imap(_simulate, seeds, chunksize=4):
            samples.append(sample)
            if len(samples) % 50 == 0:
                left_s = (time.monotonic() - start_s) / len(samples) * (num_scenarios - len(samples))
                print(f"{len(samples)}/{num_scenarios} scenarios, {left_s:.0f} s left", file=sys.stderr, flush=True)
    return samples


_trace: Agreement | None = None


def _load_trace() -> None:
    global _trace
    _trace = read_agreement(bundled_agreement())


def _simulate(seed: str) -> Sample:
    rng = random.Random(seed)  # noqa: S311 - a simulation
    return _crowded(rng) if rng.random() < _CROWDED_SHARE else _alone(rng)


def _alone(rng: random.Random) -> Sample:
    route, answers = _random_route(rng), _random_answers(rng)
    inputs: list[NDArray[np.float32]] = []
    speeds: list[float] = []
    for decision in CATALOGUE.values():
        tracker = Tracker()
        num_tokens, seconds = 0, 0.0
        for make in answers:
            size = _PLAIN_TOKENS if decision.mode is Mode.PLAIN else _TOKENS
            request = simulate_request(make(), route, StaticPolicy(decision), tracker, size)
            num_tokens += len(request.tokens) - request.arrivals[0][1]
            seconds += request.arrivals[-1][0] - request.arrivals[0][0]
            inputs.append(features(tracker.observe(), decision))
        speeds.append(num_tokens / max(seconds, 1e-9))
    return _sample(inputs, speeds)


def _crowded(rng: random.Random) -> Sample:
    """Simulate several drafters at one target, all with the same window, so that none gains at the others' cost."""
    scenario = _random_crowd(rng)
    inputs: list[NDArray[np.float32]] = []
    speeds: list[float] = []
    for decision in CATALOGUE.values():
        fleet = Fleet(scenario, partial(StaticPolicy, decision), _trace if scenario.acceptance.trace else None)
        logs = fleet.run().logs
        num_tokens = sum(log.num_tokens - log.first_size for log in logs)
        speeds.append(num_tokens / max(sum(log.finished_s - log.first_s for log in logs), 1e-9))
        inputs += [features(tracker.observe(), decision) for tracker in fleet.trackers[:_TEXTS]]
    return _sample(inputs, speeds)


def _sample(inputs: Sequence[NDArray[np.float32]], speeds: Sequence[float]) -> Sample:
    label = np.log(np.array(speeds, np.float32) / speeds[0])
    return Sample(inputs=np.stack(inputs), label=label.astype(np.float32))


def _random_crowd(rng: random.Random) -> Scenario:
    count = rng.choice((2, 4, 8, 8, 16, 24))
    stage_s = _log_uniform(rng, 0.01, 0.06)
    is_recorded = rng.random() < 0.4
    return Scenario(
        seed=rng.getrandbits(32),
        links={"edge": Link(latency=Seconds(_log_uniform(rng, 0.001, 0.06)), jitter=Seconds(0.001))},
        drafters=(DrafterPool(count=count, link="edge", step=Cost(fixed=Seconds(_log_uniform(rng, 0.001, 0.03)))),),
        targets=(
            TargetPool(
                stages=rng.choice((1, 1, 1, 2)),
                stage=Cost(fixed=Seconds(stage_s), per_node=Seconds(stage_s * rng.choice((0.0, 0.005, 0.02, 0.08)))),
                max_batch=rng.choice((count, max(2, count // 2))),
            ),
        ),
        # The drafters work most of the time, and join at any moment of the others' passes.
        workload=Workload(
            arrivals="closed",
            concurrency=count,
            requests=2 * count,
            think=Seconds(stage_s),
            prompt=Length(mean=20, variation=0.5),
            answer=Length(mean=_CROWD_TOKENS, variation=0.4),
        ),
        acceptance=Acceptance(
            rate=rng.uniform(0.3, 0.98),
            persistence=rng.uniform(0, 0.9),
            num_candidates=rng.choice((2, 12)),
            trace="bundled" if is_recorded else "",
            category=rng.choice(("chat", "maths", "code")) if is_recorded else "",
        ),
    )


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * math.exp(rng.random() * math.log(high / low))


def _random_route(rng: random.Random) -> RouteModel:
    num_stages = rng.choice((1, 1, 2, 2, 3, 3, 4, 6, 8))
    stage_s = _log_uniform(rng, 0.001, 0.06)
    per_node = rng.choice((0.0, 0.02, 0.1, 0.3)) * rng.random() * 2
    stages = tuple(
        PassCost.line(stage_s * scale, stage_s * per_node * scale)
        for scale in (rng.uniform(0.6, 1.6) for _ in range(num_stages))
    )
    draft_s = _log_uniform(rng, 0.0005, 0.06)
    return RouteModel(
        stages=stages,
        link=LinkModel(latency_s=_log_uniform(rng, 0.0005, 0.12)),
        draft=PassCost.line(draft_s, draft_s * rng.choice((0.0, 0.05, 0.3)) * rng.random()),
        cores=rng.choice((0.0, 0.0, 0.0, 1.0, rng.uniform(1, 2), rng.uniform(1, 2), 4.0)),
        handling_s=rng.choice((0.0, 0.003)) * rng.random(),
        coordinator_s=rng.choice((0.0, 0.003)) * rng.random(),
    )


def _random_answers(rng: random.Random) -> list:  # type: ignore[type-arg]
    """Return functions that make the scenario's texts. Every arm writes the same ones."""
    if rng.random() < 0.5:
        assert _trace is not None
        category = rng.choice(("chat", "maths", "code"))
        texts = [text for text in _trace.texts if text.category == category and len(text.tokens) > _TOKENS]
        chosen = rng.sample(texts, _TEXTS)
        vocab_size = _trace.vocab_size
        return [lambda text=text: RecordedAnswer(text, 1, vocab_size) for text in chosen]
    agreement = AgreementModel(rate=rng.uniform(0.3, 0.98), persistence=rng.uniform(0, 0.9), num_candidates=12)
    seeds = [rng.getrandbits(32) for _ in range(_TEXTS)]
    return [lambda seed=seed: _parametric(agreement, seed) for seed in seeds]


def _parametric(agreement: AgreementModel, seed: int) -> Answer:
    return ParametricAnswer(agreement, seed)


if __name__ == "__main__":
    sys.exit(main())
