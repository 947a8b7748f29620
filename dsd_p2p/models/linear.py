"""Replaces the linear layers of a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def swap_linear_layers(
    model: Any, make: Callable[[torch.Tensor, torch.Tensor | None], nn.Module], *, with_conv1d: bool
) -> None:
    """Replace every linear layer, including the LM head, with `make(weight, bias)`.

    weight: `[out, in]`. bias: `[out]` or None. Subclasses of `nn.Linear` stay, because they compute something else.
    with_conv1d: also replace GPT-2's layers. They sum in another order than `nn.Linear`, so the last bits change.
    """
    with torch.inference_mode():
        for name, module in list(model.named_modules()):
            if name.endswith("dt_proj"):
                continue  # Mamba 1 reads this layer's weight and bias itself.
            if type(module) is nn.Linear:
                bias = None if module.bias is None else module.bias.detach()
                model.set_submodule(name, make(module.weight.detach(), bias))
            elif with_conv1d and isinstance(module, Conv1D):
                # These store their weight transposed.
                model.set_submodule(name, make(module.weight.detach().T.contiguous(), module.bias.detach()))
