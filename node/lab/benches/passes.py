"""Implements `dsd bench passes`: the cost of a pass that sessions share, and the gain of packed weights (CPU)."""

import time

import torch

from dsd_p2p import units
from dsd_p2p.cache.passes import SpanPass
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.packed import can_pack
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, compute_format, find_model
from dsd_p2p.models.span import TORCH_DTYPES, SpanModel
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import Span
from node.lab.config import PassesConfig
from node.lab.receipt import print_table, sample

_CONTEXT = 128
_SESSIONS = (1, 2, 4, 8, 16, 32, 64)
_ROWS = (1, 4)
_WINDOWS = (1, 2, 3, 4, 5, 8, 12, 16)


def run_passes(config: PassesConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time a middle stage's passes by number of sessions and of new nodes in each, in turns. Each context is 128.

    Raises:
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    num_layers = read_shape(source.folder).num_layers
    span = Span(*even_spans(num_layers, config.stages)[config.stages // 2])
    cache_bytes = units.num_bytes(config.cache_memory)
    model = open_span(source, span, dtype=config.dtype, device=config.device, cache_bytes=cache_bytes)
    arms = [(count, rows) for rows in _ROWS for count in _SESSIONS if count <= config.sessions]
    seconds: dict[tuple[int, int], list[float]] = {arm: [] for arm in arms}
    for number in range(-1, rounds):
        for arm in arms:
            taken = _time(model, *arm)
            if number >= 0:
                seconds[arm].append(taken)
    alone = {rows: sample(seconds[1, rows]).median for rows in _ROWS}
    shares = {arm: arm[0] * alone[arm[1]] / sample(values).median for arm, values in seconds.items()}
    names = {arm: f"{arm[0]} sessions of {arm[1]}" for arm in arms}
    print_table(
        ("arm", "pass, ms", "speed-up over separate passes"),
        [(names[arm], f"{1000 * sample(seconds[arm]).median:.2f}", f"{shares[arm]:.2f}") for arm in arms],
    )
    results = {
        names[arm]: {"pass_ms": sample([1000 * value for value in seconds[arm]]), "passes_alone": shares[arm]}
        for arm in arms
    }
    packing = []
    if can_pack(model.torch_dtype, config.device):
        spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
        packing = [_compare_packing(config, source, each, rounds) for each in dict.fromkeys((spans[0], spans[-1]))]
    return {
        "model": config.model,
        "span": str(span),
        "dtype": config.dtype,
        "device": config.device,
        "arms": results,
        "packing": packing,
    }


def _compare_packing(config: PassesConfig, source: ModelSource, span: Span, rounds: int) -> dict[str, object]:
    """Time passes of one window with torch's linear layers and with packed ones, in turns."""
    cache_bytes = units.num_bytes(config.cache_memory)
    loaded = load_span(source, span, TORCH_DTYPES[compute_format(config.dtype)], "cpu")
    models: dict[str, OpenSpan] = {
        "torch": SpanModel(loaded, pass_order(read_model_config(source.folder)), cache_bytes=cache_bytes),
        "packed": open_span(source, span, dtype=config.dtype, cache_bytes=cache_bytes),
    }
    samples: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in _WINDOWS} for name in models}
    for number in range(-1, rounds):
        for rows in _WINDOWS:
            for name, model in models.items():
                taken = _time(model, 1, rows)
                if number >= 0:
                    samples[name][rows].append(1000 * taken)
    pass_ms = {name: {rows: sample(values) for rows, values in of.items()} for name, of in samples.items()}
    print_table(
        (f"layers {span}, ms of a window of", *map(str, _WINDOWS)),
        [(name, *(f"{of[rows].median:.1f}" for rows in _WINDOWS)) for name, of in pass_ms.items()],
    )
    return {"span": str(span), "pass_ms": pass_ms}


def _time(model: OpenSpan, num_sessions: int, num_rows: int) -> float:
    """Return the seconds of one pass over `num_rows` new nodes of each session."""
    caches = [model.new_cache(_CONTEXT + num_rows) for _ in range(num_sessions)]
    tables = [SlotTable() for _ in caches]
    row = bytes(model.row_bytes)
    try:
        for cache, table in zip(caches, tables, strict=True):
            filling = table.chain(_CONTEXT)
            inputs = [0] * _CONTEXT if model.is_head else row * _CONTEXT
            model.run([SpanPass(cache=cache, forward=filling, inputs=inputs)])
        nodes = range(_CONTEXT, _CONTEXT + num_rows)
        passes = [
            SpanPass(
                cache=cache,
                forward=table.append(nodes, [node - 1 for node in nodes], nodes),
                inputs=[0] * num_rows if model.is_head else row * num_rows,
                wanted=range(num_rows) if model.is_tail else (),
            )
            for cache, table in zip(caches, tables, strict=True)
        ]
        start_s = time.perf_counter()
        model.run(passes)
        return time.perf_counter() - start_s
    finally:
        for cache in caches:
            cache.free()
