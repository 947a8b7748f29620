"""Implements `dsd bench peers`: the int8 pass beside llama.cpp in this process, and over stages on loopback."""

import time
from typing import Any

import numpy as np
import torch
import trio

from dsd_p2p.cache.slots import CacheEdit, SlotTable
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span
from dsd_p2p.window.static import PLAIN, StaticPolicy
from node.lab.benches.serving import serving_swarm, write_together
from node.lab.config import PeersConfig
from node.lab.receipt import print_table, sample

_CONTEXT = 200
_WINDOWS = (1, 4, 8, 16, 32)


async def run_peers(config: PeersConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time a token of llama.cpp, windows of the whole model, and a token over stage processes, in turns.

    Raises:
        ConfigError: llama.cpp's wheel is not installed, or the model is no GGUF file.
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    if source.path.suffix != ".gguf":
        raise ConfigError(f"--model {config.model}: llama.cpp needs a GGUF file")
    shape = read_shape(source.folder)
    llama = _Llama(str(source.path), config.threads)
    model = open_span(source, Span(0, shape.num_layers), dtype=config.dtype)
    prompt = [(7 * index) % min(40_000, shape.vocab_size) for index in range(_CONTEXT)]
    whole = _Whole(model, prompt)
    llama_ms: list[float] = []
    window_ms: dict[int, list[float]] = {rows: [] for rows in _WINDOWS}
    split_ms: list[float] = []
    async with serving_swarm(config, source, shape.num_layers, shape.vocab_size, progress) as engine:
        for number in range(-1, rounds):
            progress.step("llama.cpp, one process, stages on loopback", max(0, number), rounds)
            taken = {rows: await trio.to_thread.run_sync(whole.window_ms, rows) for rows in _WINDOWS}
            theirs = await trio.to_thread.run_sync(llama.token_ms, config.max_tokens)
            run = await write_together(engine, config, [prompt], lambda: StaticPolicy(PLAIN))
            # Round -1 warms up.
            if number >= 0:
                llama_ms.append(theirs)
                split_ms.append(1000 * _median(run.gaps_s))
                for rows, ms in taken.items():
                    window_ms[rows].append(ms)
    results: dict[str, object] = {
        "model": config.model,
        "weights": config.dtype,
        "context": _CONTEXT,
        "threads": config.threads,
        "stages": config.stages,
        "llama_ms": sample(llama_ms),
        "window_ms": {rows: sample(values) for rows, values in window_ms.items()},
        "loopback_ms": sample(split_ms),
        "token_time_ratio": _median([a / b for a, b in zip(window_ms[1], llama_ms, strict=True)]),
        "window16_ratio": _median([a / b for a, b in zip(window_ms[16], window_ms[1], strict=True)]),
        "loopback_ratio": _median([a / b for a, b in zip(split_ms, window_ms[1], strict=True)]),
    }
    _show(config, results, llama_ms, window_ms, split_ms)
    return results


class _Whole:
    """The whole model in this process, after a prompt."""

    def __init__(self, model: OpenSpan, prompt: list[int]) -> None:
        self._model, self._prompt = model, prompt
        self._cache = model.new_cache(len(prompt) + max(_WINDOWS))
        model.views(self._cache, SlotTable().chain(len(prompt)), prompt, [len(prompt) - 1])

    def window_ms(self, num_rows: int) -> float:
        """Return the median milliseconds of a window of `num_rows` nodes, a chain, with the logits of each."""
        taken = []
        for _ in range(7):
            slots = SlotTable(len(self._prompt))
            names = range(num_rows)
            positions = range(len(self._prompt), len(self._prompt) + num_rows)
            forward = slots.append(names, [None, *names[:-1]], positions)
            start_s = time.perf_counter()
            self._model.views(self._cache, forward, self._prompt[:num_rows], range(num_rows))
            taken.append(1000 * (time.perf_counter() - start_s))
            self._cache.edit(CacheEdit(num_kept=len(self._prompt), gathered=np.empty(0, np.int64)))
        return _median(taken)


class _Llama:
    """llama.cpp in this process."""

    def __init__(self, gguf: str, threads: int) -> None:
        try:
            import xllamacpp
        except ImportError as exc:
            raise ConfigError("llama.cpp is not installed: pip install -c constraints.txt 'dsd-p2p[bench]'") from exc
        parameters: Any = xllamacpp.CommonParams()
        parameters.model.path = gguf
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, True
        self._server: Any = xllamacpp.Server(parameters)

    def token_ms(self, num_tokens: int) -> float:
        """Return the milliseconds of a token at a context of about 200."""
        answer = self._server.handle_completions(
            {
                "prompt": "the quick brown fox jumps over the lazy dog " * (_CONTEXT // 9),
                "n_predict": num_tokens,
                "temperature": 0,
                "cache_prompt": True,
                "ignore_eos": True,
            }
        )
        return float(answer["timings"]["predicted_per_token_ms"])


def _median(values: list[float]) -> float:
    return sample(values).median


def _show(
    config: PeersConfig,
    results: dict[str, object],
    llama_ms: list[float],
    window_ms: dict[int, list[float]],
    split_ms: list[float],
) -> None:
    rows = [("llama.cpp, a token", llama_ms)]
    rows += [(f"{config.dtype}, a window of {rows}", values) for rows, values in window_ms.items()]
    rows.append((f"{config.stages} stages on loopback, a token", split_ms))
    print_table(
        (f"{config.model}, context {_CONTEXT}", "median, ms", "range"),
        [(name, f"{sample(values).median:.1f}", f"{min(values):.1f} to {max(values):.1f}") for name, values in rows],
    )
    for name in ("token_time_ratio", "window16_ratio", "loopback_ratio"):
        print(f"{name}: {results[name]:.2f}")
