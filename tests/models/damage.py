"""Damages a model's folder in one place, as a bad download, a bad disk or a bad edit does."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_VALUES = (None, 0, -1, 1, 3, 7, 64, 10**9, 0.5, -1e30, "x", "", [], [1], {}, {"a": 1}, True, False)


def damage(folder: Path, source: Path, rng: random.Random) -> str:
    """Copy `source` to `folder`, damage it in one place, and return what was done."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return rng.choice(_WAYS)(folder, rng)


def _change_field(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["config.json"] * 6 + ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    at, where = values, name
    while isinstance(at, dict) and at:
        key = rng.choice(list(at))
        where += f".{key}"
        if isinstance(at[key], dict) and at[key] and rng.random() < 0.7:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
            where += " is gone"
        else:
            at[key] = rng.choice(_VALUES)
            where += f" is {at[key]!r}"
        break
    path.write_text(json.dumps(values))
    return where


def _change_tensor(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    match rng.choice(["gone", "shape", "dtype", "name", "more", "nan"]):
        case "gone":
            del tensors[name]
            done = "is gone"
        case "shape":
            tensors[name] = tensors[name][..., :-1].contiguous()
            done = "is smaller"
        case "dtype":
            tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.float16, torch.float8_e4m3fn, torch.bool]))
            done = f"is {tensors[name].dtype}"
        case "name":
            tensors[name + "x"] = tensors.pop(name)
            done = "has another name"
        case "more":
            tensors[name + "_scale_inv"] = torch.ones(1)
            done = "has a scale"
        case _:
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[0] = float("nan")
            done = "has a NaN"
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {done}"


def _cut(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    length = rng.randrange(len(data))
    path.write_bytes(data[:length])
    return f"{path.name} ends after {length} bytes"


def _flip(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    at = rng.randrange(min(len(data), 3000))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"byte {at} of {path.name} is flipped"


def _remove(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    return f"{path.name} is gone"


_WAYS: tuple[Callable[[Path, random.Random], str], ...] = (
    _change_field,
    _change_field,
    _change_field,
    _change_tensor,
    _change_tensor,
    _cut,
    _flip,
    _remove,
)
