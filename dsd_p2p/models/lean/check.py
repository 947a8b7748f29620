"""Checks lean layers: that they compute what transformers' layers compute, and that windows change no bit."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.cache.slots import Forward, SlotTable
from dsd_p2p.errors import ModelError
from dsd_p2p.models.lean.span import LeanSpan
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import Span

logger = logging.getLogger(__name__)

_NUM_ROWS, _TOLERANCE = 12, 1e-3
_CONTEXTS, _WINDOW = (1, 37, 130), 16

Values = NDArray[Any]


def check_structure(lean: LeanSpan, stock: SpanModel) -> None:
    """Compare lean layers in float32 with transformers' own, on rows of random numbers or tokens.

    Raises:
        ModelError: they do not compute the same.
    """
    inputs = _inputs(lean, _NUM_ROWS, 0)
    found, expected = (
        _outputs(each, each.new_cache(_NUM_ROWS), SlotTable().chain(_NUM_ROWS), inputs) for each in (lean, stock)
    )
    scale = max(float(np.abs(expected).max()), 1e-6)
    difference = float(np.abs(found - expected).max()) / scale
    if not difference <= _TOLERANCE:
        raise ModelError(f"layers {stock.span} differ from transformers' own by {difference:.1e} of the largest value")


def settle_exactness(model: LeanSpan) -> None:
    """Run windows, trees and single rows through the first and the last layer; where bits differ, run row by row.

    Raises:
        ModelError: not even the same row gives the same bits twice.
    """
    starts = sorted({model.span.first, model.span.last - 1})
    ends = [model.narrow(Span(start, start + 1)) for start in starts]
    if all(_is_exact(each) for each in ends):
        return
    for each in (model, *ends):
        each.is_by_row = True
    if not all(_is_exact(each) for each in ends):
        raise ModelError("int8 products of this machine do not give the same bits twice: use --weights float")
    logger.warning("int8 runs row by row, which is slow: on this machine a row's bits depend on the rows beside it")


def _is_exact(model: LeanSpan) -> bool:
    """Return whether every row has the same bits alone, in a window, in a tree, and after a prompt in two pieces."""
    for context in _CONTEXTS:
        prompt, window, others = (_inputs(model, count, context) for count in (context, _WINDOW, _WINDOW))
        names = range(context, context + _WINDOW)
        parents = [None, *names[:-1]]
        alone = _after(
            model, [prompt], [([name], [parent], [name]) for name, parent in zip(names, parents, strict=True)], window
        )
        together = _after(model, [prompt], [(names, parents, names)], window)
        # A tree in which every node of the window has a sibling.
        siblings = [1000 + name for name in names]
        tree = _after(
            model,
            [prompt[: context // 2], prompt[context // 2 :]],
            [(_mixed(names, siblings), _mixed(parents, parents), _mixed(names, names))],
            np.stack([window, others], axis=1).reshape(-1, *window.shape[1:]),
        )[::2]
        if not np.array_equal(alone, together) or not np.array_equal(alone, tree):
            return False
    return True


_Nodes = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]
"""Names, parents and positions of the nodes of one pass."""


def _after(model: LeanSpan, prompt: Sequence[Values], passes: Sequence[_Nodes], inputs: Values) -> Values:
    """Return what the passes give after the prompt's pieces."""
    num_prompt = sum(len(piece) for piece in prompt)
    cache, slots = model.new_cache(num_prompt + len(inputs)), SlotTable()
    try:
        done = 0
        for piece in (each for each in prompt if len(each)):
            names = range(done, done + len(piece))
            forward = slots.append(names, [name - 1 if name else None for name in names], names)
            _outputs(model, cache, forward, piece)
            done += len(piece)
        slots.settle(num_prompt - 1)
        found, done = [], 0
        for nodes, parents, positions in passes:
            forward = slots.append(nodes, parents, positions)
            found.append(_outputs(model, cache, forward, inputs[done : done + len(nodes)]))
            done += len(nodes)
    finally:
        cache.free()
    return np.concatenate(found)


def _inputs(model: LeanSpan, count: int, seed: int) -> Values:
    """Return token ids for a head, else hidden states."""
    rng = np.random.default_rng(seed + count)
    if model.is_head:
        return rng.integers(0, model.shape.vocab_size, count)
    return rng.standard_normal((count, model.shape.hidden_size), np.float32)


def _outputs(model: LeanSpan | SpanModel, cache: object, forward: Forward, inputs: Values) -> Values:
    given = inputs.tobytes() if inputs.ndim > 1 else inputs.tolist()
    if model.is_tail:
        return np.stack([view.logits() for view in model.views(cache, forward, given, range(len(inputs)))])
    return np.frombuffer(model.hidden(cache, forward, given), np.float32).reshape(len(inputs), -1)


def _mixed(a: Sequence[int | None], b: Sequence[int | None]) -> list[int | None]:
    return [each for pair in zip(a, b, strict=True) for each in pair]
