"""Smooths a model for int8: moves the outliers of its activations into its weights, without changing what it computes.

How it works (SmoothQuant, arXiv 2211.10438). A few channels of a norm's output are a hundred times larger than the rest, so
one scale for a row rounds all others coarsely. Dividing the channel by `s` and multiplying the columns of the next
products by `s` changes nothing in exact arithmetic and spares the rounding. `s` balances the largest activation that some
prompts show with the largest weight. This is done where it helps: before `gate` and `up`, whose rows get one int8 part
(`dsd_p2p.models.lean.products`), and for the MLP's inner channels, between `up` and `down`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import ModelError
from dsd_p2p.models.lean.build import mlp_norm, norm_of
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import TokenId

STRENGTH = 0.5
"""How far the outliers move: 0 leaves them in the activations, 1 moves them into the weights altogether."""


@torch.inference_mode()
def smooth(stock: SpanModel, prompts: Sequence[Sequence[TokenId]], strength: float = STRENGTH) -> None:
    """Change a whole float32 model in place, by what its activations are on the prompts.

    Raises:
        ModelError: the layers have parts that are not known here.
    """
    before = _last_logits(stock, prompts[0])
    _smooth(stock, prompts, strength)
    after = _last_logits(stock, prompts[0])
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-2 * float(before.abs().max())):
        raise ModelError("layers of another build: smoothing changed what they compute")


def _last_logits(stock: SpanModel, prompt: Sequence[TokenId]) -> Tensor:
    cache = stock.new_cache(len(prompt))
    (view,) = stock.views(cache, SlotTable().chain(len(prompt)), list(prompt), [len(prompt) - 1])
    cache.free()
    return view.row.clone()


def _smooth(stock: SpanModel, prompts: Sequence[Sequence[TokenId]], strength: float) -> None:
    layers = getattr(stock.model.base_model, stock.loaded.parts.layers)
    largest: dict[Any, Tensor] = {}
    try:
        watched = [mlp_norm(layer) for layer in layers]
        hooks = [each.register_forward_hook(_note(largest)) for each in watched]
        hooks += [layer.mlp.down_proj.register_forward_pre_hook(_note_input(largest)) for layer in layers]
        mlps = [(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj) for layer in layers]
    except AttributeError as exc:
        raise ModelError(f"a layer of another build, at {exc}") from exc
    try:
        for prompt in prompts:
            _last_logits(stock, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (gate, up, down) in zip(layers, mlps, strict=True):
        _move(mlp_norm(layer), [gate, up], largest, strength)
        scales = _scales(largest[down], [down.weight], strength)
        up.weight.div_(scales[:, None])
        down.weight.mul_(scales)


def _note(largest: dict[Any, Tensor]) -> Any:
    def note(module: Any, _inputs: object, output: Tensor) -> None:
        _raise(largest, module, output)

    return note


def _note_input(largest: dict[Any, Tensor]) -> Any:
    def note(module: Any, inputs: tuple[Tensor]) -> None:
        _raise(largest, module, inputs[0])

    return note


def _raise(largest: dict[Any, Tensor], module: Any, values: Tensor) -> None:
    rows = values.detach().abs().flatten(0, -2).amax(0)
    largest[module] = torch.maximum(largest[module], rows) if module in largest else rows


def _move(norm: Any, linears: Sequence[Any], largest: dict[Any, Tensor], strength: float) -> None:
    scales = _scales(largest[norm], [each.weight for each in linears], strength)
    # Some families store a norm's weight less one.
    offset = (norm_of(norm).weight - norm.weight).round()
    norm.weight.copy_((norm.weight + offset) / scales - offset)
    for each in linears:
        each.weight.mul_(scales)


def _scales(activations: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    columns = torch.stack([each.abs().amax(0) for each in weights]).amax(0)
    return (activations.clamp_min(1e-5) ** strength / columns.clamp_min(1e-5) ** (1 - strength)).clamp(1e-3, 1e3)
