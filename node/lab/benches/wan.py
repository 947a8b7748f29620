"""Implements `dsd bench wan`: real models over emulated wide-area links; all arms share stages and prompts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from dsd_p2p.errors import ConfigError, LocalProtocolError
from dsd_p2p.models.progress import Progress
from dsd_p2p.sim.agreement import RecordedText
from dsd_p2p.types import Relaxation, TokenId
from dsd_p2p.window.analytic import SYNC_DEPTHS, predicted_tokens_per_s
from dsd_p2p.window.base import Observation, WindowPolicy
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain, sync_tree
from node.client.choices import make_relaxation
from node.client.client import Client, open_client
from node.config import GenerateConfig
from node.lab.benches.arms import PLAIN_ARM, ArmRuns, mean_accepted_length, ratios_to_plain
from node.lab.config import WanConfig
from node.lab.quality.prompts import load_problems, spread
from node.lab.receipt import print_table, sample
from node.lab.simulator.asking import record_text

_PAPER_DEPTH = 8
"""γ of arXiv:2511.11733."""

RELAXED_ARM = "continuous_tree_relaxed"


async def run_wan(config: WanConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Run every cell of models x stages x links. `ratios` are those of the first cell.

    Raises:
        DsdError: a model cannot be loaded, a route broke, or two exact arms wrote different float32 text.
    """
    cells = [
        await _run_cell(config, model, stages, link, rounds, progress)
        for model in config.models
        for stages in config.stages
        for link in config.links
    ]
    return {"ratios": cells[0]["ratios"], "cells": cells}


async def _run_cell(
    config: WanConfig, model: str, stages: int, link: str, rounds: int, progress: Progress
) -> dict[str, object]:
    generate = _cell_config(config, model, stages, link)
    relaxed = make_relaxation(
        GenerateConfig(verify="relaxed" if config.relaxed else "exact", relaxation=config.relaxation)
    )
    problems = {category: load_problems(category, progress) for category in config.prompts}
    num_sweeps = 1 if config.policies or config.finalists else 0
    async with open_client(generate, progress) as client:
        prompts = {
            category: [
                (problem.name, client.text.encode(problem.prompt, is_raw=False))
                for problem in spread(group, num_sweeps + rounds)
            ]
            for category, group in problems.items()
        }
        # Measure the costs first: they decide γ of the sync arm. These answers are not counted.
        for policy in (StaticPolicy(sync_chain(_PAPER_DEPTH)), _tree(config)):
            await client.write(policy, prompt=prompts[config.prompts[0]][0][1], max_tokens=24)
        arms = _arms(config, client.engine.observe())
        title = f"{model} {stages} stages {link}"
        cell = _Cell(name=title, config=config, client=client, prompts=prompts, arms=arms, relaxation=relaxed)
        swept, runs = await cell.play_all(num_sweeps, rounds, progress)
        observation = client.engine.observe()
        num_layers = max(info.num_layers for info in client.engine.links.known.values())
        recorded = _record(client, prompts, cell.answers) if config.record else None
    identical = _identical_share(cell.answers)
    if config.dtype == "float32" and identical < 1:
        raise LocalProtocolError("two exact arms wrote different float32 tokens: please report it")
    ratios = ratios_to_plain(runs)
    predicted = {name: predicted_tokens_per_s(policy.decide(observation), observation) for name, policy in arms.items()}
    _print(model, stages, link, runs, predicted)
    return {
        "model": model,
        "stages": stages,
        "num_layers": num_layers,
        "link": link,
        "dtype": config.dtype,
        "device": config.device,
        "netlab": config.netlab,
        "drafter": client.engine.drafter.name,
        "temperature": config.temperature,
        "rounds": rounds,
        "ratios": {name: ratio.median for name, ratio in ratios.items()},
        "ratio_samples": ratios,
        "ratios_by_category": {category: _ratios_of(runs, category) for category in problems},
        "tokens_per_s": {name: sample(arm.tokens_per_s()) for name, arm in runs.items()},
        "predicted_tokens_per_s": predicted,
        "mean_accepted_length": {name: mean_accepted_length(arm) for name, arm in runs.items()},
        "identical": identical,
        "observation": asdict(observation),
        "recorded": recorded,
        "regret": _regret(runs, config),
        "swept_tokens_per_s": {name: arm.tokens_per_s()[0] for name, arm in swept.items()},
        "runs": {name: arm.rows() for name, arm in runs.items()},
    }


def _cell_config(config: WanConfig, model: str, stages: int, link: str) -> GenerateConfig:
    return GenerateConfig(
        model=model,
        stages=stages,
        link=link,
        netlab=config.netlab,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        draft=config.draft,
        draft_dtype=config.draft_dtype,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
        hidden=config.hidden,
        stall_timeout="120s",
    )


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One model, number of stages and link.

    name: shown with the progress. answers: what each arm wrote, by round and problem.
    """

    name: str
    config: WanConfig
    client: Client
    prompts: dict[str, list[tuple[str, list[TokenId]]]]
    arms: dict[str, WindowPolicy]
    relaxation: Relaxation | None
    answers: dict[tuple[int, str], dict[str, list[TokenId]]] = field(default_factory=dict)

    async def play_all(
        self, num_sweeps: int, rounds: int, progress: Progress
    ) -> tuple[dict[str, ArmRuns], dict[str, ArmRuns]]:
        """Have all arms play the uncounted sweeps and the remaining arms play the rounds. Return both."""
        names = [*self.arms, RELAXED_ARM] if self.relaxation else list(self.arms)
        swept = await self.play(range(num_sweeps), names, progress)
        if self.config.finalists:
            names = _finalists(swept, self.config)
        return swept, await self.play(range(num_sweeps, num_sweeps + rounds), names, progress)

    async def play(self, rounds: range, names: list[str], progress: Progress) -> dict[str, ArmRuns]:
        """Have each arm answer the prompts of `rounds`. Each round starts with another arm."""
        runs: dict[str, ArmRuns] = {}
        for number in rounds:
            for category, group in self.prompts.items():
                problem, prompt = group[number]
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    tokens, stats = await self.client.write(
                        self.arms["continuous_tree" if name == RELAXED_ARM else name],
                        prompt=prompt,
                        max_tokens=self.config.plain_tokens if name == PLAIN_ARM else None,
                        relaxation=self.relaxation if name == RELAXED_ARM else None,
                        # Policies and fixed windows must not profit from one another's measurements.
                        experience=name if self.config.policies else "",
                    )
                    runs.setdefault(name, ArmRuns()).add(number, {"problem": problem, "category": category}, stats)
                    self.answers.setdefault((number, problem), {})[name] = tokens
                    progress.step(f"{self.name}: round {number + 1}/{rounds.stop} {name}", 0, 0)
        return runs


def _fixed(runs: Mapping[str, ArmRuns], config: WanConfig) -> dict[str, float]:
    """Return the tokens a second of the fixed windows, fastest first."""
    speeds = {name: arm.speed() for name, arm in runs.items() if name not in config.policies}
    return dict(sorted(speeds.items(), key=lambda item: -item[1]))


def _finalists(swept: Mapping[str, ArmRuns], config: WanConfig) -> list[str]:
    return list(dict.fromkeys([PLAIN_ARM, *list(_fixed(swept, config))[: config.finalists], *config.policies]))


def _regret(runs: Mapping[str, ArmRuns], config: WanConfig) -> dict[str, float]:
    """Return how much slower each policy was than the best fixed window, as a share of that window's speed."""
    best = next(iter(_fixed(runs, config).values()))
    return {name: 1 - runs[name].speed() / best for name in config.policies}


def _record(
    client: Client,
    prompts: dict[str, list[tuple[str, list[TokenId]]]],
    answers: dict[tuple[int, str], dict[str, list[TokenId]]],
) -> dict[str, RecordedText]:
    """Record the drafter's candidates along the longest answer to each prompt."""
    by_problem = {problem: max(by_arm.values(), key=len) for (_, problem), by_arm in answers.items()}
    return {
        problem: record_text(client.engine.drafter, problem, prompt, by_problem[problem])
        for group in prompts.values()
        for problem, prompt in group
        if problem in by_problem
    }


def _tree(config: WanConfig) -> StaticPolicy:
    return StaticPolicy(
        continuous_tree(
            depth=96,
            width=config.width,
            window_nodes=config.window_nodes,
            max_in_flight=config.in_flight,
            min_path_prob=0.01,
        )
    )


def _arms(config: WanConfig, observation: Observation) -> dict[str, WindowPolicy]:
    if config.arms:
        names = list(CATALOGUE) if config.arms == ("all",) else [PLAIN_ARM, *config.arms]
        unknown = [name for name in names if name not in CATALOGUE]
        if unknown:
            raise ConfigError(f"--arms {', '.join(unknown)}: no such window, choose from {', '.join(CATALOGUE)}")
        fixed: dict[str, WindowPolicy] = {name: StaticPolicy(CATALOGUE[name]) for name in names}
        return fixed | {name: adaptive_policy(name) for name in config.policies}
    best_depth = max(SYNC_DEPTHS, key=lambda depth: predicted_tokens_per_s(sync_chain(depth), observation))
    return {
        PLAIN_ARM: StaticPolicy(PLAIN),
        "sync_chain_8": StaticPolicy(sync_chain(_PAPER_DEPTH)),
        "sync_chain": StaticPolicy(sync_chain(best_depth)),
        "sync_tree": StaticPolicy(sync_tree(16, depth=6)),
        "continuous_chain": StaticPolicy(continuous_tree(depth=48, width=1, window_nodes=4, max_in_flight=64)),
        "continuous_tree": _tree(config),
        **{name: adaptive_policy(name) for name in ("analytic", "learned")},
    }


def _identical_share(answers: dict[tuple[int, str], dict[str, list[TokenId]]]) -> float:
    """Return the share of exact answers that equal the beginning of the longest one.

    Plain decoding writes shorter answers, so only the common part is compared.
    """
    same = []
    for by_arm in answers.values():
        exact = [tokens for name, tokens in by_arm.items() if name != RELAXED_ARM]
        longest = max(exact, key=len)
        same += [tokens == longest[: len(tokens)] for tokens in exact]
    return sum(same) / len(same)


def _ratios_of(runs: dict[str, ArmRuns], category: str) -> dict[str, float]:
    of_category: dict[str, ArmRuns] = {}
    for name, arm in runs.items():
        of_category[name] = ArmRuns()
        for prompt, stats in arm.runs:
            if prompt["category"] == category:
                of_category[name].add(0, prompt, stats)
    return {name: ratio.median for name, ratio in ratios_to_plain(of_category).items()}


def _print(model: str, stages: int, link: str, runs: dict[str, ArmRuns], predicted: dict[str, float]) -> None:
    ratios = ratios_to_plain(runs)
    rows = []
    for name, arm in runs.items():
        speeds = sample(arm.tokens_per_s())
        ratio = (
            f"{ratios[name].median:.2f} ({ratios[name].low:.2f} .. {ratios[name].high:.2f})" if name in ratios else "1"
        )
        promise = f"{predicted[name]:.2f}" if name in predicted else ""
        rows.append((name, f"{speeds.median:.2f}", ratio, promise))
    print_table((f"{model}, {stages} stages, {link}", "tokens/s", "over plain", "predicted tokens/s"), rows)
