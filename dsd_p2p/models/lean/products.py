"""Multiplies rows with a weight matrix: in int8, in the 4-bit groups of a checkpoint, or in float32 to check the layers.

All take rows that are divided by their largest magnitude. The int8 products round with a fixed scale, and the 4-bit ones
to bfloat16, so a row's result has the same bits whatever rows are in the call.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Groups

_NUM_REFINED, _NUM_GROUPS, _GROUP = 32, 16, 64

_FULL_RANGE, _REDUCED_RANGE = 127, 63
"""Steps from zero to the largest magnitude. Without VNNI, fbgemm's products of two full 8-bit numbers overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A matrix. floats: `[out, in]`, float32. groups: the same in 4-bit numbers, where the checkpoint has them."""

    floats: Tensor
    groups: Groups | None = None

    def map(self, rows: Callable[[Tensor], Tensor]) -> "Weight":
        """Return the matrix after an operation on its rows."""
        return Weight(floats=rows(self.floats), groups=None if self.groups is None else self.groups.map(rows))

    @staticmethod
    def cat(weights: Sequence["Weight"]) -> "Weight":
        """Return the matrix of all rows. It has groups if all have groups of one size."""
        groups = [each.groups for each in weights if each.groups is not None]
        is_grouped = len(groups) == len(weights) and len({each.size for each in groups}) == 1
        return Weight(
            floats=torch.cat([each.floats for each in weights]),
            groups=Groups(
                numbers=torch.cat([each.numbers for each in groups]),
                scales=torch.cat([each.scales for each in groups]),
                offsets=torch.cat([each.offsets for each in groups]),
                size=groups[0].size,
            )
            if is_grouped
            else None,
        )


class FloatProduct(nn.Module):
    """A product in float32. weight: `[out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.num_bytes = weight.numel() * weight.element_size()

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]` to `[n, out]`."""
        return nn.functional.linear(rows, self.weight)


class Int8Product(nn.Module):
    """A product with int8 weights, one scale for each output channel. weight: float32 `[out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = pack(weight)
        self.steps = full_range()
        # One byte for each weight; a double and an integer for each row.
        self.num_bytes = weight.numel() + 16 * len(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, out]`."""
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1.0 / self.steps, self.steps + 1, self.packed
        )
        return product


class Int4Product(nn.Module):
    """A product with weights in 4-bit groups; scales, offsets and results are rounded to bfloat16, sums are float32."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(groups.numbers.int(), 1)
        # torch's kernel takes numbers from -8 to 7.
        offsets = groups.offsets + 8 * groups.scales
        self.scales = torch.stack([groups.scales.T, offsets.T], dim=-1).bfloat16().contiguous()
        self.size = groups.size
        self.num_bytes = self.packed.nbytes + self.scales.nbytes

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, out]`."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), self.packed, self.size, self.scales
        )
        return product.float()


_INT4_ROWS = 16
_INT4_SIZES = (32, 64, 128, 256)


def has_int4(weight: Weight) -> bool:
    """Return whether torch's kernel computes with the matrix's own 4-bit numbers."""
    groups = weight.groups
    return groups is not None and len(groups.numbers) % _INT4_ROWS == 0 and groups.size in _INT4_SIZES


class Int8TwiceProduct(Int8Product):
    """The same with activations of twice the bits: what rounding leaves of a row goes along as a second row."""

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, out]`."""
        num_rows = rows.size(0)
        scaled = rows * self.steps
        rounded = scaled.round()
        both: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.cat([rounded / self.steps, scaled.sub_(rounded)]), 1.0 / self.steps, self.steps + 1, self.packed
        )
        return both[:num_rows].add_(both[num_rows:], alpha=1.0 / self.steps)


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Return the tokens of about the `count` largest logits, `[n, count]`; the largest ones are always among them.

    Sorting all logits would take longer than computing them. So groups are sorted by their largest logit, and then the
    logits of the first groups.
    """
    num_rows, vocab_size = logits.shape
    num_groups = vocab_size // _GROUP
    if num_groups <= _NUM_GROUPS:
        return logits.topk(min(count, vocab_size), sorted=False).indices
    groups = logits[:, : num_groups * _GROUP].view(num_rows, num_groups, _GROUP).amax(-1).topk(_NUM_GROUPS).indices
    members = (groups[:, :, None] * _GROUP + torch.arange(_GROUP)).flatten(1)
    rest = torch.arange(num_groups * _GROUP, vocab_size).expand(num_rows, -1)
    members = torch.cat([members, rest], dim=1)
    return members.gather(1, logits.gather(1, members).topk(count, sorted=False).indices)


def num_bytes_of(product: nn.Module) -> int:
    """Return the size of a product's weights."""
    assert isinstance(product, FloatProduct | Int4Product | Int8Product)
    return product.num_bytes


class RefinedHead(Int8Product):
    """The head: int8 logits, of which the largest are computed again with the row as it is.

    Rounding a row costs most where tokens nearly tie. Computing the `_NUM_REFINED` likeliest again costs little, and the
    tokens are chosen among them. weight: float32 `[V, in]`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._rounded, self._scales = round_channels(weight)
        self.num_bytes += self._rounded.nbytes + self._scales.nbytes

    def forward(self, rows: Tensor) -> Tensor:
        """Map `[n, in]`, between -1 and 1, to `[n, V]`."""
        logits = super().forward(rows)
        likeliest = _likeliest(logits, _NUM_REFINED)
        weights = self._rounded[likeliest].float()
        # In float64 the order of the sum does not show after rounding.
        exact = (weights * rows[:, None]).sum(-1, dtype=torch.float64).float().mul_(self._scales[likeliest])
        return logits.scatter_(1, likeliest, exact)


MakeProduct = Callable[[Weight], nn.Module]


def check_finite(weight: Tensor) -> None:
    """Check weights, which int8 kernels do not.

    Raises:
        ModelError: one is not finite.
    """
    # A number that is not finite is the smallest or the largest.
    if not all(bool(torch.isfinite(each)) for each in torch.aminmax(weight)):
        raise ModelError("the model's weights are not finite: fetch them again, or take another checkpoint")


def full_range() -> int:
    """Return the steps between zero and the largest magnitude of a row on this CPU."""
    check = getattr(torch.cpu, "_is_vnni_supported", None)
    return _FULL_RANGE if check is not None and check() else _REDUCED_RANGE


def _scales_of(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=1).clamp_min(1e-12) / 127


def _rounded(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous()


def round_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 weights `[out, in]` in int8, and the scale of each output channel.

    Raises:
        ModelError: a weight is not finite.
    """
    scales = _scales_of(weight)
    check_finite(scales)
    return _rounded(weight, scales), scales


def pack(weight: Tensor) -> Any:
    """Return float32 weights `[out, in]` in int8, one scale for each output channel, in the engine's order.

    Raises:
        ModelError: a weight is not finite.
    """
    rounded, scales = round_channels(weight)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in engines else "qnnpack"
    with warnings.catch_warnings():
        # torch deprecates its quantized tensors but offers no other int8 kernels for the CPU.
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)
