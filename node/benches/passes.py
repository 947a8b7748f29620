"""`dsd bench passes`: what a stage's pass costs as sessions share it."""

import time

import torch

from dsd_p2p import units
from dsd_p2p.models.architecture import read_config as read_model_config
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.session.passes import SpanPass
from dsd_p2p.session.slots import SlotTable
from dsd_p2p.types import Span
from node.bench import print_table, sample
from node.config import UsersConfig

_CONTEXT = 128
_SESSIONS = (1, 2, 4, 8, 16, 32, 64)
_ROWS = (1, 4)


def run_passes(config: UsersConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time a middle stage's passes, in turns: so many sessions with so many new nodes each, all with a context of 128.

    Raises:
        ModelError: the model cannot be had.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    num_layers = int(read_model_config(source.folder).num_hidden_layers)
    span = Span(*even_spans(num_layers, config.stages)[config.stages // 2])
    cache_bytes = units.num_bytes(config.cache_memory)
    model = SpanModel(source, span, dtype=config.dtype, device=config.device, cache_bytes=cache_bytes)
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
        ("arm", "pass, ms", "as many passes as alone"),
        [(names[arm], f"{1000 * sample(seconds[arm]).median:.2f}", f"{shares[arm]:.2f}") for arm in arms],
    )
    results = {
        names[arm]: {"pass_ms": sample([1000 * value for value in seconds[arm]]), "passes_alone": shares[arm]}
        for arm in arms
    }
    return {"model": config.model, "span": str(span), "dtype": config.dtype, "device": config.device, "arms": results}


def _time(model: SpanModel, num_sessions: int, num_rows: int) -> float:
    """Seconds of one pass over `num_rows` new nodes of each session."""
    caches = [model.new_cache(_CONTEXT + num_rows) for _ in range(num_sessions)]
    tables = [SlotTable() for _ in caches]
    row = bytes(model.row_bytes)
    try:
        for cache, table in zip(caches, tables, strict=True):
            filling = table.append(range(_CONTEXT), [None, *range(_CONTEXT - 1)], range(_CONTEXT))
            model.run([SpanPass(cache=cache, forward=filling, inputs=row * _CONTEXT)])
        nodes = range(_CONTEXT, _CONTEXT + num_rows)
        passes = [
            SpanPass(
                cache=cache, forward=table.append(nodes, [node - 1 for node in nodes], nodes), inputs=row * num_rows
            )
            for cache, table in zip(caches, tables, strict=True)
        ]
        start_s = time.perf_counter()
        model.run(passes)
        return time.perf_counter() - start_s
    finally:
        for cache in caches:
            cache.free()
