"""Implements `dsd bench ring`: measures the live protocol at stage times that this machine could not compute at."""

from dataclasses import asdict
from pathlib import Path

import msgspec

from dsd_p2p import units
from dsd_p2p.coordination.engine import Engine, GenerateOptions, open_engine
from dsd_p2p.coordination.statistics import AnswerStatistics, statistics_of
from dsd_p2p.errors import ConfigError, LocalProtocolError
from dsd_p2p.models.progress import Progress
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.sim.agreement import Agreement, read_agreement
from dsd_p2p.sim.answer import RecordedAnswer
from dsd_p2p.sim.route import RouteModel, simulate_request
from dsd_p2p.sim.service import PassCost
from dsd_p2p.transport.ephemeral import open_ephemeral
from dsd_p2p.types import TextRequest
from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain, sync_tree
from dsd_p2p.window.tracker import Tracker
from node.config import NodeConfig
from node.lab.benches.arms import PLAIN_ARM, ArmRuns, mean_accepted_length, ratios_to_plain
from node.lab.config import RingConfig
from node.lab.quality.prompts import CATEGORIES
from node.lab.receipt import Sample, print_table, sample
from node.lab.recorded import FakeStage, RecordedDrafter, ServiceTimes, bundled_agreement
from node.local.local_swarm import stage_swarm

_SYNC_DEPTHS = (4, 6, 8, 12, 16, 24)
_SYNC_TREE_NODES = (16, 32, 64)
_PLAIN_TOKENS = 10
"""Plain decoding takes the same time for every token, so more tokens would only take longer."""


async def run_ring(config: RingConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Run every arm on one text of each category in each round. Return the ratios and all data behind them.

    Raises:
        ConfigError: a flag or the agreement is unusable.
    """
    path = Path(config.trace) if config.trace else bundled_agreement()
    trace = read_agreement(path)
    route = _route_model(config)
    texts = [_texts_of_round(trace, number) for number in range(rounds)]
    arms = choose_arms(trace, route, texts[0], config.max_tokens)
    runs = await _play(config, path, trace, arms, texts, progress)
    simulated = {
        name: _simulate(trace, route, [text for group in texts for text in group], decision, config.max_tokens)
        for name, decision in arms.items()
    }
    ratios = ratios_to_plain(runs)
    _show(runs, ratios, simulated)
    return {
        "ratios": {name: ratio.median for name, ratio in ratios.items()},
        "ratio_samples": ratios,
        "tokens_per_s": {name: sample(arm.tokens_per_s()) for name, arm in runs.items()},
        "simulated_ratios": {
            name: rate / simulated[PLAIN_ARM] for name, rate in simulated.items() if name != PLAIN_ARM
        },
        "mean_accepted_length": {name: mean_accepted_length(arm) for name, arm in runs.items()},
        "config": msgspec.to_builtins(config),
        "trace": {"target": trace.target, "drafter": trace.drafter, "dtype": trace.dtype, "date": trace.date},
        "decisions": {name: asdict(decision) for name, decision in arms.items()},
        "runs": {name: arm.rows() for name, arm in runs.items()},
    }


async def _play(
    config: RingConfig,
    path: Path,
    trace: Agreement,
    arms: dict[str, Decision],
    texts: list[list[int]],
    progress: Progress,
) -> dict[str, ArmRuns]:
    """Have every arm write the texts of each round over one ring.

    path: the agreement's file, for the stages.
    """
    runs = {name: ArmRuns() for name in arms}
    drafter = RecordedDrafter(trace, units.seconds(config.draft_time))
    async with (
        stage_swarm("node.lab.fake_stages", _fake_stages(config, path), progress) as local_nodes,
        open_ephemeral(config.link_model()) as transport,
        open_engine(transport, drafter, trace.vocab_size) as (engine, stages),
    ):
        await stages.add([node.address for node in local_nodes])
        # The windows are fixed, and all arms share what is measured of the route (pace, the drafter's sharpening).
        for number, round_texts in enumerate(texts):
            for text in round_texts:
                for name, decision in arms.items():
                    max_tokens = _PLAIN_TOKENS if name == PLAIN_ARM else config.max_tokens
                    stats = await _write(engine, trace, text, decision, max_tokens)
                    asked = {"text": trace.texts[text].source, "category": trace.texts[text].category}
                    runs[name].add(number, asked, stats)
                    progress.step(f"round {number + 1}/{len(texts)} {name}", 0, 0)
    return runs


def _fake_stages(config: RingConfig, path: Path) -> list[FakeStage]:
    times = ServiceTimes(
        trace=str(path), stage_s=units.seconds(config.stage_time), node_s=units.seconds(config.node_time)
    )
    return [
        FakeStage(
            config=NodeConfig(span=f"{index}:{index + 1}", link=config.link, rate=config.rate, jitter=config.jitter),
            times=times,
            num_stages=config.stages,
        )
        for index in range(config.stages)
    ]


def _show(runs: dict[str, ArmRuns], ratios: dict[str, Sample], simulated: dict[str, float]) -> None:
    print_table(
        ("arm", "tokens/s", "over plain", "range", "simulated"),
        [
            (
                name,
                f"{sample(runs[name].tokens_per_s()).median:.2f}",
                f"{ratio.median:.2f}",
                f"{ratio.low:.2f} .. {ratio.high:.2f}",
                f"{simulated[name] / simulated[PLAIN_ARM]:.2f}",
            )
            for name, ratio in ratios.items()
        ],
    )


def choose_arms(trace: Agreement, route: RouteModel, texts: list[int], max_tokens: int) -> dict[str, Decision]:
    """Return one decision for each arm. The sync arms get the γ and the tree size that are best in the simulator."""

    def best(candidates: list[Decision]) -> Decision:
        return max(candidates, key=lambda decision: _simulate(trace, route, texts, decision, max_tokens))

    return {
        PLAIN_ARM: PLAIN,
        "sync_chain": best([sync_chain(depth) for depth in _SYNC_DEPTHS]),
        "sync_tree": best([sync_tree(nodes, depth=8) for nodes in _SYNC_TREE_NODES]),
        "continuous_chain": continuous_tree(depth=64, width=1, window_nodes=4, max_in_flight=64),
        "continuous_tree": continuous_tree(depth=96, width=12, window_nodes=16, max_in_flight=128, min_path_prob=0.001),
    }


def _simulate(trace: Agreement, route: RouteModel, texts: list[int], decision: Decision, max_tokens: int) -> float:
    """Return the tokens a second over all `texts`, counted as `ArmRuns` does."""
    num_tokens, seconds = 0, 0.0
    tracker = Tracker()
    for text in texts:
        recorded = trace.texts[text]
        answer = RecordedAnswer(recorded, 1, trace.vocab_size)
        num_written = min(max_tokens, len(recorded.tokens))
        request = simulate_request(answer, route, StaticPolicy(decision), tracker, num_written)
        num_tokens += len(request.tokens) - request.arrivals[0][1]
        seconds += request.arrivals[-1][0] - request.arrivals[0][0]
    return num_tokens / seconds


def _route_model(config: RingConfig) -> RouteModel:
    stage = PassCost.line(units.seconds(config.stage_time), units.seconds(config.node_time))
    return RouteModel(
        stages=(stage,) * config.stages,
        link=LinkModel(latency_s=units.seconds(config.link)),
        draft=PassCost.line(units.seconds(config.draft_time), 0.0),
    )


def _texts_of_round(trace: Agreement, number: int) -> list[int]:
    texts = []
    for category in CATEGORIES:
        of_category = [index for index, text in enumerate(trace.texts) if text.category == category]
        if not of_category:
            raise ConfigError(f"the agreement has no {category} texts: record one with `dsd sim record`")
        texts.append(of_category[number % len(of_category)])
    return texts


async def _write(engine: Engine, trace: Agreement, text: int, decision: Decision, max_tokens: int) -> AnswerStatistics:
    recorded = list(trace.texts[text].tokens[:max_tokens])
    options = GenerateOptions(text=TextRequest(max_tokens=len(recorded)))
    async with engine.generate([text], options, StaticPolicy(decision)) as generation:
        tokens = [token async for token in generation]
    if tokens != recorded:
        raise LocalProtocolError(f"text {trace.texts[text].source} differs from the recorded text: please report it")
    return statistics_of(generation)
