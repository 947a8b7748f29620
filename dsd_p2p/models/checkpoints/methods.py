"""The formats of quantised safetensors: which tensors make up a weight, and how.

Sources: GPTQ and AWQ as their kernels read them (https://github.com/ModelCloud/GPTQModel, https://github.com/mit-han-lab/llm-awq);
compressed-tensors (https://github.com/vllm-project/compressed-tensors); FP8 in blocks as DeepSeek-V3 publishes it; MXFP4
of the OCP Microscaling Formats specification 1.0.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Groups

_INT32_BITS = 32
_NUM_BITS = 4
_BYTE_BITS = 8
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the eight numbers of an AWQ word lie, as multiples of four bits."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Parts = Mapping[str, Tensor]


class Method:
    """One format.

    name: for messages. parts: the suffixes of the tensors that each weight has; the first is the packed one.
    separator: before a suffix. target: what replaces them in the weight's name. optional: suffixes of parts that a weight
        may have. ignored: suffixes of tensors that change nothing here.
    """

    name: str
    parts: tuple[str, ...]
    separator = "."
    target = ".weight"
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def all_parts(self) -> tuple[str, ...]:
        """The suffixes that are read."""
        return (*self.parts, *self.optional)

    def floats(self, parts: Parts) -> Tensor:
        """Return the weight in float32."""
        raise NotImplementedError

    def groups(self, parts: Parts) -> Groups | None:
        """Return the weight's 4-bit numbers, or None if they are others."""
        del parts
        return None


class MakeMethod(Protocol):
    """Makes a method from a checkpoint's quantization_config."""

    def __call__(self, config: Mapping[str, Any], /) -> Method:
        """Return the method, or raise ModelError if this variant of it is not supported."""
        ...


def method_of(config: Mapping[str, Any]) -> Method:
    """Return how a checkpoint with this quantization_config stores its weights.

    Raises:
        ModelError: the format is not supported.
    """
    name = str(config.get("quant_method", "")).lower()
    make = _METHODS.get(name)
    if make is None:
        known = ", ".join(_METHODS)
        raise ModelError(f"weights quantised by {name or 'an unnamed method'} are not supported; these are: {known}")
    try:
        return make(config)
    except (AttributeError, TypeError, ValueError) as exc:
        raise ModelError(f"the config's quantization_config for {name} is broken ({exc}): fetch it again") from exc


def unpacked(packed: Tensor, bits: int, *, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Return the numbers of int32 words as int32, `dim` grown by 32 / bits. order: where each lies, else one after another.

    Raises:
        ValueError: numbers of `bits` bits do not fill a word.
    """
    if _INT32_BITS % bits:
        raise ValueError(f"{bits}-bit numbers are not supported")
    places = order or tuple(range(_INT32_BITS // bits))
    shifts = torch.tensor(places, dtype=torch.int32) * bits
    words = packed.to(torch.int32).movedim(dim, -1)
    numbers = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(-2).movedim(-1, dim)


class _InGroups(Method):
    """A method whose weight is `(number - zero) * scale`, with zeros and scales by groups of columns."""

    def floats(self, parts: Parts) -> Tensor:
        numbers, zeros, scales, group_of = self._taken(parts)
        if group_of is None:
            size = numbers.shape[1] // scales.shape[1]
            shifted = numbers.view(len(numbers), -1, size).float().sub_(zeros[..., None])
            return shifted.mul_(scales[..., None]).flatten(1)
        return numbers.float().sub_(zeros[:, group_of]).mul_(scales[:, group_of])

    def groups(self, parts: Parts) -> Groups | None:
        numbers, zeros, scales, group_of = self._taken(parts)
        if group_of is not None or int(numbers.max()) >> _NUM_BITS or int(numbers.min()) < 0:
            return None
        size = numbers.shape[1] // scales.shape[1]
        return Groups(numbers=numbers.to(torch.uint8), scales=scales, offsets=-zeros * scales, size=size)

    def _taken(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return numbers `[out, in]`, zeros and scales `[out, groups]` in float32, and the group of each column.

        The latter is None where groups are runs of columns.
        """
        raise NotImplementedError


def _order_of(group_of: Tensor | None, num_groups: int) -> Tensor | None:
    """Return the group of each column, or None if groups are runs of columns or unsaid."""
    if group_of is None or bool((group_of < 0).all()):
        return None
    runs = torch.arange(len(group_of)) // (len(group_of) // num_groups)
    return None if torch.equal(group_of.long(), runs) else group_of.long()


class _Gptq(_InGroups):
    name = "GPTQ"
    parts = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bits = int(config.get("bits", 4))
        if self._bits not in (2, 4, 8):
            raise ModelError(f"GPTQ weights in {self._bits} bits are not supported: take those in 2, 4 or 8")
        # The first version of the format stores zeros less one.
        self._shift = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def _taken(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        numbers = unpacked(parts["qweight"], self._bits, dim=0).T.contiguous()
        mask = (1 << self._bits) - 1
        zeros = (unpacked(parts["qzeros"], self._bits, dim=1) + self._shift) & mask
        scales = parts["scales"].float().T.contiguous()
        return numbers, zeros.float().T.contiguous(), scales, _order_of(parts.get("g_idx"), scales.shape[1])


class _Awq(_InGroups):
    name = "AWQ"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm" or int(config.get("bits", 4)) != _NUM_BITS:
            raise ModelError(
                f"AWQ weights of version {version} are not supported: take those of version gemm in 4 bits"
            )

    def _taken(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        numbers, zeros = (
            unpacked(parts[name], 4, dim=1, order=_AWQ_ORDER).T.contiguous() for name in ("qweight", "qzeros")
        )
        return numbers, zeros.float(), parts["scales"].float().T.contiguous(), None


class _CompressedPacked(_InGroups):
    name = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx")

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def _taken(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        num_rows, num_columns = parts["weight_shape"].tolist()
        numbers = unpacked(parts["weight_packed"], self._bits, dim=1)[:, :num_columns].contiguous()
        scales = parts["weight_scale"].float().view(num_rows, -1)
        if "weight_zero_point" in parts:
            zeros = unpacked(parts["weight_zero_point"], self._bits, dim=0)[:num_rows].float()
        else:
            zeros = torch.full_like(scales, 1 << (self._bits - 1))
        return numbers, zeros, scales, _order_of(parts.get("weight_g_idx"), scales.shape[1])


class _Scaled(Method):
    """Weights that are numbers of 8 bits, times a scale for each block of rows and columns."""

    optional = ("weight_zero_point",)
    ignored = ("input_scale", "input_zero_point", "activation_scale")

    def __init__(self, name: str, scale: str, block: tuple[int, int] | None = None) -> None:
        self.name, self.parts, self._scale, self._block = name, ("weight", scale), scale, block

    def floats(self, parts: Parts) -> Tensor:
        weight, scales = parts["weight"].float(), parts[self._scale].float()
        if "weight_zero_point" in parts:
            weight = weight - parts["weight_zero_point"].float()
        if self._block is not None:
            rows, columns = self._block
            scales = scales.repeat_interleave(rows, dim=0)[: len(weight)]
            scales = scales.repeat_interleave(columns, dim=1)[:, : weight.shape[1]]
        return weight * scales.view(-1, scales.shape[-1]) if scales.ndim > 1 else weight * scales.view(-1, 1)


def _compressed(config: Mapping[str, Any]) -> Method:
    groups = list(config.get("config_groups", {}).values())
    if len(groups) != 1:
        raise ModelError("compressed-tensors with several formats in one checkpoint are not supported")
    weights, kind = groups[0].get("weights") or {}, str(groups[0].get("format") or config.get("format"))
    if weights.get("num_bits") in (4, 8) and kind == "pack-quantized":
        return _CompressedPacked(int(weights["num_bits"]))
    if kind in ("int-quantized", "float-quantized", "naive-quantized") and weights.get("num_bits") == _BYTE_BITS:
        block = weights.get("block_structure") if weights.get("strategy") == "block" else None
        if weights.get("strategy") in ("tensor", "channel", "block"):
            return _Scaled("compressed-tensors", "weight_scale", tuple(block) if block else None)
    raise ModelError(
        f"compressed-tensors of format {kind}, {weights.get('num_bits')} bits by {weights.get('strategy')}, are not supported"
    )


def _fp8(config: Mapping[str, Any]) -> Method:
    rows, columns = config.get("weight_block_size") or (0, 0)
    if not rows:
        return _Scaled("FP8", "weight_scale")
    return _Scaled("FP8", "weight_scale_inv", (int(rows), int(columns)))


class _Mxfp4(Method):
    """Experts in blocks of 32 numbers of 4 bits with a common exponent, as gpt-oss has them."""

    name = "MXFP4"
    parts = ("blocks", "scales")
    separator = "_"
    target = ""

    def __init__(self, config: Mapping[str, Any]) -> None:
        del config

    def floats(self, parts: Parts) -> Tensor:
        blocks, exponents = parts["blocks"], parts["scales"].int() - 127
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
        # The file has an expert's outputs first, transformers its inputs.
        return torch.ldexp(numbers, exponents[..., None]).flatten(-2).transpose(1, 2).contiguous()


_METHODS: Mapping[str, MakeMethod] = {
    "gptq": _Gptq,
    "awq": _Awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "mxfp4": _Mxfp4,
}
