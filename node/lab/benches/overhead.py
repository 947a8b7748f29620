"""Implements `dsd bench overhead`: the cost of splitting a model into stage processes."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from dsd_p2p.errors import ConfigError, LocalProtocolError
from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.source import compute_format, find_model
from dsd_p2p.models.span import TORCH_DTYPES
from dsd_p2p.types import INT8, TokenId
from dsd_p2p.window.static import PLAIN, StaticPolicy
from node.client.client import open_client
from node.config import GenerateConfig
from node.console import ConsoleProgress, console
from node.lab.receipt import print_table, sample

_MIB = 2**20


async def run_overhead(config: GenerateConfig, rounds: int) -> dict[str, object]:
    """Measure plain decoding with the unsplit model in this process and through the stage processes, in turns.

    Raises:
        ConfigError: the weights are int8.
    """
    if config.dtype == INT8:
        raise ConfigError("--weights int8: transformers has none to compare with; dsd bench peers measures int8")
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
                assert stats.details is not None, "stages of this machine are coordinated here"
                token_s, stage_s = 1 / stats.timing.tokens_per_s, stats.details.mean_stage_s
                split_s.append(token_s)
                hop_s.append((token_s - sum(stage_s)) / (len(stage_s) + 1))
            memory = [_memory(stage.pid, stage.weight_bytes) for stage in client.started]
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
    print_table(
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
    torch.set_num_threads(config.threads)
    with ConsoleProgress() as progress:
        return load_whole(find_model(config.model, progress), TORCH_DTYPES[compute_format(config.dtype)])


def _write_unsplit(model: Any, prompt: Sequence[TokenId], num_tokens: int) -> tuple[list[TokenId], float]:
    """Write greedy text with transformers' own forward and cache. Return it and the seconds a token after the first."""
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
    """Return a stage's peak resident memory and its current proportional share, in MiB.

    The proportional share counts pages that forked stages share only once.
    """
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


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _milliseconds(seconds: list[float]) -> tuple[str, str]:
    return f"{1e3 * sample(seconds).median:.2f}", f"{1e3 * min(seconds):.2f} .. {1e3 * max(seconds):.2f}"
