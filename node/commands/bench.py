"""`dsd bench overhead|distance`: what the split costs, and what speculation gains over links with a delay."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p.errors import ConfigError, LocalProtocolError
from dsd_p2p.models.source import find_model
from dsd_p2p.types import TokenId
from dsd_p2p.window.analytic import predicted_tokens_per_s
from dsd_p2p.window.base import Decision, Mode, Observation, WindowPolicy
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain
from node.bench import machine, sample, write_receipt
from node.choices import make_policy
from node.client import open_client
from node.config import GenerateConfig, read_config
from node.console import ConsoleProgress, console

_PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "A train travels 60 km in 45 minutes. What is its speed in km/h? Explain step by step.",
)
_MIB = 2**20


def run(options: dict[str, object]) -> int:
    """Measure, print a table, write a receipt."""
    what = options.pop("what")
    rounds = int(str(options.pop("rounds", 5)))
    file = options.pop("config", None)
    defaults: dict[str, object] = {"max_tokens": 64, "prompt": _PROMPTS[0]}
    if what == "distance":
        defaults["link"] = "50ms"
    config = read_config(GenerateConfig, str(file) if file else None, defaults | options)
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}: at least 1")
    before = machine()
    results = trio.run(_overhead, config, rounds) if what == "overhead" else trio.run(_distance, config, rounds)
    write_receipt(str(what), config.seed, results, before)
    if config.json:
        print(msgspec.json.encode(results).decode(), flush=True)
    return 0


# What the split costs


async def _overhead(config: GenerateConfig, rounds: int) -> dict[str, object]:
    """Plain decoding, unsplit in this process and through the stage processes, in turn."""
    config = msgspec.structs.replace(config, draft="ngram")
    unsplit_s, split_s, hop_s = [], [], []
    with ConsoleProgress() as progress:
        unsplit = _load_unsplit(config)
        async with open_client(config, progress) as client:
            progress.close()
            await client.write(StaticPolicy(PLAIN))
            for _ in range(rounds):
                expected, seconds = _write_unsplit(unsplit, client.prompt, config.max_tokens)
                unsplit_s.append(seconds)
                tokens, stats = await client.write(StaticPolicy(PLAIN))
                if tokens != expected[: len(tokens)]:
                    raise LocalProtocolError("split and unsplit wrote different tokens")
                token_s = 1 / _number(stats["tokens_per_s"])
                stage_s = stats["mean_stage_s"]
                assert isinstance(stage_s, list)
                split_s.append(token_s)
                hop_s.append((token_s - sum(stage_s)) / (len(stage_s) + 1))
            memory = [_memory(node.pid, node.weight_bytes) for node in client.nodes]
    ratios = [split / whole for split, whole in zip(split_s, unsplit_s, strict=True)]
    results: dict[str, object] = {
        "stages": config.stages,
        "model": config.model,
        "dtype": config.dtype,
        "threads": config.threads,
        "unsplit_s_per_token": sample(unsplit_s),
        "split_s_per_token": sample(split_s),
        "ratio": sample(ratios),
        "hop_s": sample(hop_s),
        "stage_memory_mib": memory,
    }
    _print_table(
        ("measure", "median", "range"),
        [
            ("unsplit, ms a token", *_milliseconds(unsplit_s)),
            (f"{config.stages} stage processes, ms a token", *_milliseconds(split_s)),
            ("ratio", f"{sample(ratios).median:.3f}", f"{min(ratios):.3f} .. {max(ratios):.3f}"),
            ("a hop, ms", *_milliseconds(hop_s)),
        ],
    )
    for stage in memory:
        console.print(f"stage memory, MiB: {stage}")
    return results


def _load_unsplit(config: GenerateConfig) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(config.threads)
    with ConsoleProgress() as progress:
        folder = find_model(config.model, progress).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype).eval()


def _write_unsplit(model: Any, prompt: Sequence[TokenId], num_tokens: int) -> tuple[list[TokenId], float]:
    """Greedy text by transformers' own forward and cache; seconds a token after the first."""
    tokens: list[TokenId] = []
    with torch.inference_mode():
        output = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        tokens.append(int(output.logits[0, -1].argmax()))
        start_s = time.perf_counter()
        for _ in range(num_tokens - 1):
            output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens, (time.perf_counter() - start_s) / max(1, num_tokens - 1)


def _memory(pid: int, weight_bytes: int) -> dict[str, float]:
    """Peak resident memory of a stage, and its proportional share now: pages that forked stages share count once."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    rollup = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    weights_mib = weight_bytes / _MIB
    peak_mib = int(status["VmHWM"].split()[0]) / 1024
    share_mib = int(rollup["Pss"].split()[0]) / 1024
    return {
        "weights": round(weights_mib, 1),
        "peak_resident": round(peak_mib, 1),
        "peak_beyond_weights": round(peak_mib - weights_mib, 1),
        "proportional": round(share_mib, 1),
        "proportional_beyond_weights": round(share_mib - weights_mib, 1),
    }


# What speculation gains


async def _distance(config: GenerateConfig, rounds: int) -> dict[str, object]:
    """Every arm in turn on every prompt, all over the same stages and links."""
    arms: dict[str, WindowPolicy] = {
        "plain": StaticPolicy(PLAIN),
        "sync chain 4": StaticPolicy(sync_chain(4)),
        "sync chain 8": StaticPolicy(sync_chain(8)),
        "sync chain 12": StaticPolicy(sync_chain(12)),
        "continuous chain": make_policy(config, Mode.CONTINUOUS),
        "continuous tree": StaticPolicy(continuous_tree(depth=24, width=2, window_nodes=8, max_in_flight=4)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    lengths: dict[str, list[float]] = {name: [] for name in arms}
    predicted: dict[str, float] = {}
    with ConsoleProgress() as progress:
        async with open_client(config, progress) as client:
            progress.close()
            await client.write(arms["continuous chain"])
            for round_number in range(rounds):
                prompt = client.text.encode(_PROMPTS[round_number % len(_PROMPTS)], is_raw=False)
                answers = set()
                for name, policy in arms.items():
                    tokens, stats = await client.write(policy, prompt=prompt)
                    answers.add(tuple(tokens))
                    speeds[name].append(_number(stats["tokens_per_s"]))
                    lengths[name].append(_number(stats["mean_accepted_length"]))
                if len(answers) != 1:
                    raise LocalProtocolError("two arms wrote different tokens")
            observation = client.engine.observe()
            predicted = _predict(observation, arms)
    ratios = {
        name: [speed / plain for speed, plain in zip(values, speeds["plain"], strict=True)]
        for name, values in speeds.items()
    }
    _print_table(
        ("arm", "tokens/s", "over plain", "range", "model of structures.md"),
        [
            (
                name,
                f"{sample(speeds[name]).median:.2f}",
                f"{sample(ratios[name]).median:.2f}",
                f"{min(ratios[name]):.2f} .. {max(ratios[name]):.2f}",
                f"{predicted[name] / predicted['plain']:.2f}",
            )
            for name in arms
        ],
    )
    return {
        "stages": config.stages,
        "link": config.link,
        "model": config.model,
        "drafter": client.drafter.name,
        "max_tokens": config.max_tokens,
        "tokens_per_s": {name: sample(values) for name, values in speeds.items()},
        "ratio_to_plain": {name: sample(values) for name, values in ratios.items()},
        "mean_accepted_length": {name: sample(values) for name, values in lengths.items()},
        "predicted_tokens_per_s": predicted,
        "observation": asdict(observation),
    }


def _predict(observation: Observation, arms: dict[str, WindowPolicy]) -> dict[str, float]:
    """What the latency model says of each arm, from the costs and agreement measured in these very runs."""
    decisions: dict[str, Decision] = {name: policy.decide(observation) for name, policy in arms.items()}
    return {name: predicted_tokens_per_s(decision, observation) for name, decision in decisions.items()}


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _milliseconds(seconds: list[float]) -> tuple[str, str]:
    return f"{1e3 * sample(seconds).median:.2f}", f"{1e3 * min(seconds):.2f} .. {1e3 * max(seconds):.2f}"


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
