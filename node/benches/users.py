"""`dsd bench users`: many requests at once, beside one alone; with speculation and without."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, quantiles

import torch
import trio

from dsd_p2p.models.architecture import read_config as read_model_config
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.pipeline.engine import Engine, GenerateOptions, open_engine
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.types import Span, TokenId
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.static import PLAIN, StaticPolicy
from node.bench import print_table, sample
from node.choices import make_adaptive, make_drafter
from node.config import UsersConfig

_PROMPT_TOKENS = 24


@dataclass(slots=True)
class _Run:
    """One repetition of an arm: so many requests at once."""

    tokens: dict[int, list[TokenId]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens.values())) / self.wall_s

    @property
    def fairness(self) -> float:
        """Slowest over fastest request."""
        rates = [len(self.tokens[index]) / self.seconds[index] for index in self.tokens]
        return min(rates) / max(rates)


async def run_users(config: UsersConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Run every arm with one request and with many, in turns.

    Raises:
        ModelError: the model cannot be had.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    shape = read_model_config(source.folder)
    prompts = _prompts(int(shape.vocab_size), config.sessions)
    arms = ("plain", *config.policies)
    alone: dict[str, list[_Run]] = {arm: [] for arm in arms}
    together: dict[str, list[_Run]] = {arm: [] for arm in arms}
    async with _swarm(config, source, int(shape.num_hidden_layers), int(shape.vocab_size), progress) as engine:
        for number in range(-1, rounds):
            for arm in arms:
                one = await _write(engine, config, [prompts[max(0, number) % len(prompts)]], _policy(engine, arm))
                progress.step(f"{arm}, round {number + 1}", number + 1, rounds)
                many = await _write(engine, config, prompts, _policy(engine, arm))
                # The first, number -1, warms up: kernels, and what policies must find out.
                if number >= 0:
                    alone[arm].append(one)
                    together[arm].append(many)
    results = {arm: _summary(alone[arm], together[arm], together["plain"]) for arm in arms}
    _show(config, results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, "arms": results}


@asynccontextmanager
async def _swarm(
    config: UsersConfig, source: ModelSource, num_layers: int, vocab_size: int, progress: Progress
) -> AsyncIterator[Engine]:
    spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
    drafter = make_drafter(config, source, progress)
    if config.in_process:
        from node.benches.in_process import in_process_swarm

        async with in_process_swarm(config, source, spans, drafter) as (engine, _):
            yield engine
        return
    # Imported only here: what runs in one process needs no network.
    from dsd_p2p.transport.ephemeral import open_ephemeral
    from node.local_swarm import local_swarm, stage_configs

    async with (
        local_swarm(stage_configs(config, spans), progress) as nodes,
        open_ephemeral(config.link_model()) as transport,
        open_engine(transport, drafter, vocab_size) as (engine, stages),
    ):
        await stages.add([node.address for node in nodes])
        yield engine


def _policy(engine: Engine, arm: str) -> Callable[[], WindowPolicy]:
    if arm == "plain":
        return lambda: StaticPolicy(PLAIN)
    return lambda: engine.governed(make_adaptive(arm))


async def _write(
    engine: Engine, config: UsersConfig, prompts: Sequence[Sequence[TokenId]], policy: Callable[[], WindowPolicy]
) -> _Run:
    run = _Run()
    options = GenerateOptions(max_tokens=config.max_tokens)

    async def write(index: int) -> None:
        start_s = trio.current_time()
        async with engine.generate(prompts[index], options, policy()) as generation:
            run.tokens[index] = [token async for token in generation]
        run.seconds[index] = trio.current_time() - start_s
        times = [at_s for at_s, _ in generation.arrivals]
        run.gaps_s += [after - before for before, after in pairwise(times)]

    start_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(write, index)
    run.wall_s = trio.current_time() - start_s
    return run


def _summary(alone: list[_Run], together: list[_Run], plain: list[_Run]) -> dict[str, object]:
    gaps_ms = [1000 * gap for run in together for gap in run.gaps_s]
    singles = {tuple(next(iter(run.tokens.values()))) for run in alone}
    many = {tuple(tokens) for run in together for tokens in run.tokens.values()}
    return {
        "one_tokens_per_s": sample([run.tokens_per_s for run in alone]),
        "all_tokens_per_s": sample([run.tokens_per_s for run in together]),
        "ratio": sample([many.tokens_per_s / one.tokens_per_s for one, many in zip(alone, together, strict=True)]),
        "over_plain": sample([run.tokens_per_s / base.tokens_per_s for run, base in zip(together, plain, strict=True)]),
        "fairness": sample([run.fairness for run in together]),
        "gap_ms_p50": median(gaps_ms),
        "gap_ms_p99": quantiles(gaps_ms, n=100)[-1],
        "identical": all(run.tokens == plain[0].tokens for run in together) and singles <= many,
    }


def _show(config: UsersConfig, results: dict[str, dict[str, object]]) -> None:
    def middle(value: object) -> str:
        return f"{value.median:.2f}" if hasattr(value, "median") else str(value)

    names = ("one_tokens_per_s", "all_tokens_per_s", "ratio", "over_plain", "fairness")
    rows = [
        (arm, *(middle(row[name]) for name in names), f"{row['gap_ms_p99']:.0f}", str(row["identical"]))
        for arm, row in results.items()
    ]
    print_table(
        (
            "arm",
            "one, tokens/s",
            f"{config.sessions}, tokens/s",
            "ratio",
            "over plain",
            "fairness",
            "gap p99, ms",
            "same",
        ),
        rows,
    )


def _prompts(vocab_size: int, count: int) -> list[list[TokenId]]:
    """Tokens at random: a bench of serving needs no sense in them, and a model no tokenizer."""
    rng = random.Random(0)  # noqa: S311 - reproducible
    return [rng.choices(range(vocab_size), k=_PROMPT_TOKENS + index) for index in range(count)]
