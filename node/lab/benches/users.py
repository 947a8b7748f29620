"""Implements `dsd bench users`: many requests at once compared with one alone, with and without speculation."""

from collections.abc import Callable
from statistics import median, quantiles

import torch

from dsd_p2p.coordination.engine import Engine
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN, StaticPolicy
from node.lab.benches.serving import Run, random_prompts, serving_swarm, write_together
from node.lab.config import UsersConfig
from node.lab.receipt import print_table, sample


async def run_users(config: UsersConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Run every arm with one request and with many, in turns.

    Raises:
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    shape = read_shape(source.folder)
    prompts = random_prompts(int(shape.vocab_size), config.sessions)
    arms = ("plain", *config.policies)
    alone: dict[str, list[Run]] = {arm: [] for arm in arms}
    together: dict[str, list[Run]] = {arm: [] for arm in arms}
    async with serving_swarm(config, source, shape.num_layers, shape.vocab_size, progress) as engine:
        for number in range(-1, rounds):
            for arm in arms:
                one = await write_together(
                    engine, config, [prompts[max(0, number) % len(prompts)]], _policy(engine, arm)
                )
                progress.step(f"{arm}, round {number + 1}", number + 1, rounds)
                many = await write_together(engine, config, prompts, _policy(engine, arm))
                # Round -1 warms up the kernels and lets the policies learn.
                if number >= 0:
                    alone[arm].append(one)
                    together[arm].append(many)
    results = {arm: _summary(alone[arm], together[arm], together["plain"]) for arm in arms}
    _show(config, results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, "arms": results}


def _policy(engine: Engine, arm: str) -> Callable[[], WindowPolicy]:
    if arm == "plain":
        return lambda: StaticPolicy(PLAIN)
    return lambda: engine.governed(adaptive_policy(arm))


def _summary(alone: list[Run], together: list[Run], plain: list[Run]) -> dict[str, object]:
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
