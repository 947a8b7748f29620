"""Gives each layer the mask of its own kind in families that hand one mask to all of them (GPT-Neo).

These layers also mask by slot, which is wrong where slots are not positions. That mask is opened, because ours says
everything that it says.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

_running: ContextVar[Mapping[str, torch.Tensor]] = ContextVar("dsd_layer_masks")


def mask_by_layer(layers: Sequence[nn.Module], kinds: Sequence[str]) -> None:
    """Make each layer use the mask of its kind from the running pass."""
    for layer, kind in zip(layers, kinds, strict=True):
        for name, buffer in layer.named_buffers():
            if name.endswith(".bias") and buffer.dtype == torch.bool:
                buffer.fill_(True)
        layer.register_forward_pre_hook(_hook(kind), with_kwargs=True)


@contextmanager
def layer_masks(masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Use these masks, by kind, in the layers that run inside."""
    token = _running.set(masks)
    try:
        yield
    finally:
        _running.reset(token)


def _hook(kind: str) -> Any:
    def use_own_mask(
        _layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, named | {"attention_mask": _running.get()[kind]}

    return use_own_mask
