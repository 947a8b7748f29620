"""Packs tiny models as the tools of the quantised formats do, and returns what the packed weights stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32

Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors by suffix, and the weight that they stand for, `[out, in]`."""


def pack_folder(folder: Path, target: Path, pack: Callable[[Tensor], Packed], config: dict[str, object]) -> Path:
    """Write `folder` with packed projections to `target`; return a folder with what they stand for, in float32."""
    plain = target.with_name(target.name + "-plain")
    for each in (target, plain):
        each.mkdir()
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (each / file.name).write_bytes(file.read_bytes())
    packed, floats = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, floats[name] = pack(weight)
            prefix = name.removesuffix("weight")
            packed |= {f"{prefix}{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            packed[name] = floats[name] = weight
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    save_file({name: each.contiguous() for name, each in floats.items()}, plain / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return plain


def in_groups(weight: Tensor, bits: int = 4, group_of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return numbers `[out, in]`, zeros and scales `[out, groups]`, and the weight that they stand for."""
    num_groups = weight.shape[1] // GROUP
    if group_of is None:
        group_of = torch.arange(weight.shape[1]) // GROUP
    top = (1 << bits) - 1
    zeros, scales = torch.empty(2, len(weight), num_groups)
    for group in range(num_groups):
        columns = weight[:, group_of == group]
        low, high = columns.amin(1).clamp_max(0), columns.amax(1).clamp_min(0)
        scales[:, group] = ((high - low) / top).clamp_min(1e-8).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, top)
    numbers = (weight / scales[:, group_of] + zeros[:, group_of]).round().clamp(0, top)
    floats = (numbers - zeros[:, group_of]) * scales[:, group_of]
    return numbers.int(), zeros.int(), scales, floats


def words(numbers: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Return int32 words with 32 / bits numbers each along `dim`."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    found = []
    for start in range(0, numbers.shape[dim], per_word):
        word = torch.zeros(numbers.select(dim, 0).shape, dtype=torch.int64)
        for index in range(per_word):
            if start + index < numbers.shape[dim]:
                word |= numbers.select(dim, start + index).long() << (bits * order[index])
        found.append(torch.where(word >= 1 << 31, word - (1 << 32), word).int())
    return torch.stack(found, dim)


def gptq(weight: Tensor, bits: int = 4) -> Packed:
    numbers, zeros, scales, floats = in_groups(weight, bits)
    parts = {
        "qweight": words(numbers.T, bits, 0),
        "qzeros": words(zeros.T - 1, bits, 1),
        "scales": scales.T.half(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return parts, floats


def gptq_in_act_order(weight: Tensor) -> Packed:
    group_of = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1)) % (weight.shape[1] // GROUP)
    numbers, zeros, scales, floats = in_groups(weight, group_of=group_of)
    parts = {
        "qweight": words(numbers.T, 4, 0),
        "qzeros": words(zeros.T - 1, 4, 1),
        "scales": scales.T.half(),
        "g_idx": group_of.int(),
    }
    return parts, floats


def awq(weight: Tensor) -> Packed:
    numbers, zeros, scales, floats = in_groups(weight)
    # Number 0 lies in the lowest bits, number 1 four places up, number 2 one place up, and so on.
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    parts = {
        "qweight": words(numbers.T, 4, 1, order),
        "qzeros": words(zeros.T, 4, 1, order),
        "scales": scales.T.half(),
    }
    return parts, floats


def compressed_4_bits(weight: Tensor) -> Packed:
    numbers, zeros, scales, floats = in_groups(weight)
    parts = {
        "weight_packed": words(numbers, 4, 1),
        "weight_zero_point": words(zeros, 4, 0),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, floats


def compressed_symmetric(weight: Tensor) -> Packed:
    columns = weight.view(len(weight), -1, GROUP)
    scales = columns.abs().amax(-1) / 7
    numbers = (columns / scales[..., None]).round().clamp(-8, 7)
    parts = {
        "weight_packed": words(numbers.view_as(weight).int() + 8, 4, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, (numbers * scales[..., None]).view_as(weight)


def compressed_int8(weight: Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scales).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scales}, numbers.float() * scales


def compressed_fp8(weight: Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scales, "input_scale": torch.ones(1)}, numbers.float() * scales


def fp8_blocks(weight: Tensor, size: int = 48) -> Packed:
    """Blocks that do not divide the weight."""
    rows, columns = (-(-length // size) for length in weight.shape)
    scales = torch.empty(rows, columns)
    numbers, floats = torch.empty_like(weight).to(torch.float8_e4m3fn), torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            block = (slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            scales[row, column] = weight[block].abs().amax() / 448
            numbers[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
            floats[block] = numbers[block].float() * scales[row, column]
    return {"weight": numbers, "weight_scale_inv": scales}, floats


def _group_config(kind: str, **weights: object) -> dict[str, object]:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


FORMATS: dict[str, tuple[Callable[[Tensor], Packed], dict[str, object]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq 8 bits": (lambda weight: gptq(weight, 8), {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "gptq in act order": (gptq_in_act_order, {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "compressed 4 bits": (
        compressed_4_bits,
        _group_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
    ),
    "compressed symmetric": (
        compressed_symmetric,
        _group_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
    ),
    "compressed int8": (
        compressed_int8,
        _group_config("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "compressed fp8": (
        compressed_fp8,
        _group_config("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 in blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [48, 48]}),
}
HAS_4_BITS = {"gptq", "awq", "compressed 4 bits", "compressed symmetric"}
