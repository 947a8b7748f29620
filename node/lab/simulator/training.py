"""Teaches the window policy in the simulator: `scripts/train_policy` (docs/simulator.md).

Each scenario is a random chain, drafter and kind of text; in some of them several drafters share one target's passes. Every window
of the catalogue writes the same texts there; the label is the logarithm of its speed over plain decoding's, the inputs are what the
live tracker had observed under each of the windows.
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from dsd_p2p.window.learned.network import NUM_BLOCKS, VERSION
from dsd_p2p.window.static import PLAIN, StaticPolicy
from dsd_p2p.window.tracker import Tracker
from node.lab.recorded import bundled_agreement

_TOKENS = 40
_PLAIN_TOKENS = 12
_TEXTS = 2
_WIDTH = 48
_CROWDED_SHARE = 0.15
"""Scenarios in which drafters share a target; the others have the chain for themselves."""

_CROWD_TOKENS = 40
_MIN_LIVE_TOKENS = 12
"""Fewer measure a live window too badly to learn from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scenario, or one recorded decision: inputs `[n, features]` and the label `[arms]` they share, NaN where it is unknown."""

    inputs: NDArray[np.float32]
    label: NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, train, write the weights; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/train_policy", description=__doc__)
    parser.add_argument("--scenarios", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--live", type=Path, nargs="*", default=[], help="recordings of live runs to learn from, too")
    parser.add_argument("--output", type=Path, default=Path("dsd_p2p/data/policy.npz"))
    options = parser.parse_args(arguments)
    samples = sweep(options.scenarios, options.seed, options.processes)
    samples += [sample for path in options.live for sample in read_live(path)]
    weights, losses = train(samples, options.epochs, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **weights)
    print(f"{options.output}: {len(samples)} scenarios, loss {losses[0]:.3f} trained, {losses[1]:.3f} held out")
    return 0


def read_live(path: Path) -> list[Sample]:
    """Return what a recording (`--record`) tells of decisions: the speeds of the windows that were measured beside plain decoding.

    Raises:
        ConfigError: it cannot be read.
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
    """Simulate the scenarios on all cores; the same seed gives the same samples in the same order."""
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
    chain, answers = _random_chain(rng), _random_answers(rng)
    inputs: list[NDArray[np.float32]] = []
    speeds: list[float] = []
    for decision in CATALOGUE.values():
        tracker = Tracker()
        num_tokens, seconds = 0, 0.0
        for make in answers:
            size = _PLAIN_TOKENS if decision.mode is Mode.PLAIN else _TOKENS
            request = simulate_request(make(), chain, StaticPolicy(decision), tracker, size)
            num_tokens += len(request.tokens) - request.arrivals[0][1]
            seconds += request.arrivals[-1][0] - request.arrivals[0][0]
            inputs.append(features(tracker.observe(), decision))
        speeds.append(num_tokens / max(seconds, 1e-9))
    return _sample(inputs, speeds)


def _crowded(rng: random.Random) -> Sample:
    """Several drafters at one target, all with the same window: what one gains at the others' cost is no gain."""
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
        # All are at work most of the time, and come in at any moment of the others' passes.
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


def _random_chain(rng: random.Random) -> RouteModel:
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
    """Makers of the scenario's texts: each arm writes the same ones."""
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


def train(
    samples: Sequence[Sample], num_epochs: int, seed: int
) -> tuple[dict[str, NDArray[np.generic]], tuple[float, float]]:
    """Return the weights by name, and the L1 losses of the scenarios trained on and of the tenth that was held out."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    num_held_out = max(1, len(samples) // 10)
    mean = np.concatenate([sample.inputs for sample in samples]).mean(axis=0)
    scale = np.concatenate([sample.inputs for sample in samples]).std(axis=0) + 1e-3

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = hidden + self.outer(nn.functional.silu(self.inner(hidden)))
            return result

    class Rater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(len(NAMES), _WIDTH)
            self.blocks = nn.ModuleList([Block() for _ in range(NUM_BLOCKS)])
            self.last = nn.Linear(_WIDTH, len(CATALOGUE))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.silu(self.first(inputs))
            for block in self.blocks:
                hidden = block(hidden)
            result: torch.Tensor = self.last(nn.functional.silu(hidden))
            return result

    def tensors(part: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = np.concatenate([(sample.inputs - mean) / scale for sample in part])
        labels = np.concatenate([np.repeat(sample.label[None], len(sample.inputs), axis=0) for sample in part])
        return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)

    def loss_of(ratings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How far off the known speeds are."""
        known = torch.isfinite(labels)
        return nn.functional.l1_loss(ratings[known], labels[known])

    train_inputs, train_labels = tensors(samples[num_held_out:])
    test_inputs, test_labels = tensors(samples[:num_held_out])
    network = Rater()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    batch = 512
    for epoch in range(num_epochs):
        for chosen in torch.split(torch.randperm(len(train_inputs)), batch):
            optimizer.zero_grad()
            loss = loss_of(network(train_inputs[chosen]), train_labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        if epoch % 20 == 0:
            print(f"epoch {epoch}: {loss.item():.3f}", file=sys.stderr, flush=True)
    with torch.inference_mode():
        losses = tuple(
            loss_of(network(inputs), labels).item()
            for inputs, labels in ((train_inputs, train_labels), (test_inputs, test_labels))
        )
    weights: dict[str, NDArray[np.generic]] = {
        name: value.numpy().astype(np.float32) for name, value in network.state_dict().items()
    }
    weights |= {
        "version": np.array(VERSION),
        "arms": np.array(list(CATALOGUE)),
        "features": np.array(NAMES),
        "mean": mean.astype(np.float32),
        "scale": scale.astype(np.float32),
    }
    return weights, (losses[0], losses[1])


if __name__ == "__main__":
    sys.exit(main())
