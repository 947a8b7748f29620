"""Implements `dsd bench graphs`: passes that a GPU replays as one graph, beside passes launched kernel by kernel."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from dsd_p2p.cache.slots import CacheEdit, SlotTable
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.captured.span import CapturedSpan
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, compute_format, find_model
from dsd_p2p.models.span import TORCH_DTYPES, SpanModel
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import Span
from node.lab.config import GraphsConfig
from node.lab.receipt import print_table, sample

_CONTEXT = 200
_ROWS = (1, 4, 8, 16, 32)
_PASSES = 7


def run_graphs(config: GraphsConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time windows of a middle stage and of the whole drafter, captured and not, in turns.

    Raises:
        ConfigError: the device or number format does not exist.
        ModelError: a model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    target, drafter = (find_model(name, progress) for name in (config.model, config.draft))
    spans = even_spans(read_shape(target.folder).num_layers, config.stages)
    stage = _compare(config, target, Span(*spans[config.stages // 2]), rounds, progress)
    draft = _compare(config, drafter, Span(0, read_shape(drafter.folder).num_layers), rounds, progress)
    return {
        "model": config.model,
        "draft": config.draft,
        "dtype": config.dtype,
        "device": config.device,
        "stages": config.stages,
        "context": _CONTEXT,
        "stage": stage,
        "draft_step": draft,
    }


def _compare(
    config: GraphsConfig, source: ModelSource, span: Span, rounds: int, progress: Progress
) -> dict[str, object]:
    dtype, order = TORCH_DTYPES[compute_format(config.dtype)], pass_order(read_model_config(source.folder))
    # Each sets the attention of its own modules.
    arms: dict[str, _Windows] = {
        "launched": _Windows(SpanModel(load_span(source, span, dtype, config.device), order, device=config.device)),
        "captured": _Windows(CapturedSpan(load_span(source, span, dtype, config.device), device=config.device)),
    }
    taken: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in _ROWS} for name in arms}
    for number in range(-1, rounds):
        progress.step(f"passes of {source.name} {span}", max(0, number), rounds)
        for rows in _ROWS:
            for name, arm in arms.items():
                milliseconds = arm.run_ms(rows)
                # Round -1 warms up and captures.
                if number >= 0:
                    taken[name][rows].append(milliseconds)
    largest = max(_ROWS)
    picks = [arm.picks(largest) for arm in arms.values()]
    other_picks = sum(a != b for a, b in zip(*picks, strict=True))
    print_table(
        (f"{source.name} {span}, ms of a window of", *map(str, _ROWS)),
        [(name, *(f"{sample(of[rows]).median:.2f}" for rows in _ROWS)) for name, of in taken.items()],
    )
    return {
        "span": str(span),
        "pass_ms": {name: {rows: sample(values) for rows, values in of.items()} for name, of in taken.items()},
        "other_picks": other_picks,
    }


class _Windows:
    """A span after a prompt."""

    def __init__(self, model: SpanModel | CapturedSpan) -> None:
        self._model = model
        self._cache = model.new_cache(_CONTEXT + max(_ROWS))
        self._give(SlotTable(), 0, _CONTEXT)

    def run_ms(self, num_rows: int) -> float:
        """Return the median milliseconds of a window of `num_rows` nodes."""
        taken = []
        for _ in range(_PASSES):
            start_s = time.perf_counter()
            self._give(SlotTable(_CONTEXT), _CONTEXT, num_rows)
            taken.append(1000 * (time.perf_counter() - start_s))
            self._cache.edit(CacheEdit(num_kept=_CONTEXT, gathered=np.empty(0, np.int64)))
        return sample(taken).median

    def picks(self, num_rows: int) -> Sequence[int]:
        """Return the likeliest token after each node of a window; of a span without a head, none."""
        found = self._give(SlotTable(_CONTEXT), _CONTEXT, num_rows)
        self._cache.edit(CacheEdit(num_kept=_CONTEXT, gathered=np.empty(0, np.int64)))
        return found

    def _give(self, slots: SlotTable, first: int, num_rows: int) -> list[int]:
        names = range(first, first + num_rows)
        forward = slots.append(names, [None, *names[:-1]], names)
        model, tokens = self._model, [7 * name % 997 for name in names]
        inputs = tokens if model.is_head else bytes(model.row_bytes * num_rows)
        if model.is_tail:
            return [view.argmax() for view in model.views(self._cache, forward, inputs, range(num_rows))]
        model.hidden(self._cache, forward, inputs)
        return []
