"""Linear layers on a CPU with their weights in oneDNN's own order.

For two or three float32 rows torch's own kernel reads the weights once a row, and for a few more in no good order; a window is
always a few rows. Here a row's result is the same bits whatever rows stand beside it, in bfloat16 too: what still depends on the
size of a window is the attention.
"""

from typing import Any

import torch
from torch import nn

from dsd_p2p.models.linear import swap_linear_layers

_FEWEST_ROWS = 4
"""Fewer are computed as so many: faster, and by the same kernel as any larger number."""

_EXPECTED_ROWS = 8
"""Any small number leads oneDNN to the same order."""


class PackedLinear(nn.Module):
    """A linear layer that takes and returns the dtype of its weights.

    weight: `[out, in]`, float32 or bfloat16 on the CPU. bias: `[out]` or None.
    num_bytes: of what it holds.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        self._bias = bias
        self.num_bytes = sum(each.numel() * each.element_size() for each in (weight, bias) if each is not None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `[..., n, in]` to `[..., n, out]`."""
        num_rows = inputs.shape[-2]
        if num_rows < _FEWEST_ROWS:
            inputs = nn.functional.pad(inputs, (0, 0, 0, _FEWEST_ROWS - num_rows))
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return output[..., :num_rows, :]


def can_pack(dtype: torch.dtype, device: str) -> bool:
    """True where this torch and CPU have the kernels."""
    has_kernels = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if torch.device(device).type != "cpu" or not has_kernels:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def pack_linear_layers(model: Any) -> None:
    """Replace every linear layer of a model, the LM head included, by its `PackedLinear`."""
    swap_linear_layers(model, PackedLinear)
