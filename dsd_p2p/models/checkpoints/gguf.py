"""Reads GGUF files as they are: each tensor is dequantised when it is used, and nothing is converted on disk.

How it works. `prepare_gguf` reads a file's header once and writes the config and the tokenizer, in transformers' format,
and an index of the tensors to a small folder in the cache. transformers' own rules turn names and shapes of llama.cpp
into those of its models (5.23; they are internal, hence the pin). `GgufCheckpoint` maps the file into memory and needs
only the index.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Groups, LazyTensor, Part
from dsd_p2p.models.checkpoints.gguf_groups import groups_of

INDEX = "gguf-index.json"

Bytes = NDArray[np.uint8]

_FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)


class GgufTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a GGUF file. name: llama.cpp's. shape: of the numbers. start, num_bytes: where they lie."""

    name: str
    file: str
    kind: int
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufIndex(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to read the tensors of a model.

    architecture: llama.cpp's name of the family. config: what transformers' rules ask for. tensors: by transformers' name;
    fused experts are made of several.
    """

    architecture: str
    config: dict[str, int | None]
    tensors: dict[str, tuple[GgufTensor, ...]]


class GgufCheckpoint:
    """The tensors of one GGUF file, or of several that are parts of one model.

    folder: where `prepare_gguf` has put the index. paths: the files.
    """

    def __init__(self, folder: Path, paths: Iterable[Path]) -> None:
        self._path_of = {path.name: path for path in paths}
        try:
            self._index = msgspec.json.decode((folder / INDEX).read_bytes(), type=GgufIndex)
        except (OSError, msgspec.DecodeError) as exc:
            raise ModelError(f"{folder / INDEX}: {exc}; remove the folder, it is made again") from exc

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors, as transformers expects them."""
        return self._index.tensors.keys()

    @property
    def num_params(self) -> int:
        """How many weights the model has."""
        return sum(math.prod(part.shape) for parts in self._index.tensors.values() for part in parts)

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return what tensor `name` is made of."""
        return tuple((part.file, part.name) for part in self._index.tensors[name])

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Yield tensors that are dequantised when they are used."""
        yield {name: LazyTensor(partial(self.floats, name)) for name in names}

    def floats(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        parts = [self._dequantised(part) for part in self._index.tensors[name]]
        # Fused experts: what goes in is split over the files' tensors.
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def is_quantised(self) -> bool:
        """True if most of its weights are not floats."""
        sizes = [(math.prod(part.shape), part.kind) for parts in self._index.tensors.values() for part in parts]
        return sum(size for size, kind in sizes if kind not in _FLOATS) > sum(size for size, _ in sizes) / 2

    def groups(self, name: str) -> Groups | None:
        """Return the tensor's 4-bit numbers, or None if it is stored in another way."""
        parts = self._index.tensors[name]
        found = groups_of(parts[0].kind, self._bytes(parts[0])) if len(parts) == 1 else None
        if found is None:
            return None
        return found.map(lambda rows: torch.from_numpy(self._as_in_transformers(rows.numpy(), parts[0].name)))

    def rows(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return what dequantises single rows of a matrix, or None for other tensors."""
        parts = self._index.tensors.get(name, ())
        if len(parts) != 1 or len(parts[0].shape) != 2:
            return None
        part, raw, kind = parts[0], self._bytes(parts[0]), gguf.GGMLQuantizationType(parts[0].kind)
        return lambda rows: torch.from_numpy(_dequantised(raw[rows.numpy()], kind)).view(-1, part.shape[1])

    def hashes(self, file: str, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield each tensor's name and description."""
        with self._path_of[file].open("rb") as stream:
            for part in (each for parts in self._index.tensors.values() for each in parts if each.file == file):
                if wanted is None or part.name in wanted:
                    stream.seek(part.start)
                    digest = hashlib.sha256(stream.read(part.num_bytes)).hexdigest()
                    yield part.name, f"{part.kind} {list(part.shape)} {digest}"

    def _bytes(self, part: GgufTensor) -> Bytes:
        """Return the bytes of a tensor, `[..., bytes of a row]`."""
        mapped: Bytes = np.memmap(
            self._path_of[part.file], np.uint8, mode="c", offset=part.start, shape=(part.num_bytes,)
        )
        return mapped.reshape(*part.shape[:-1], -1)

    def _dequantised(self, part: GgufTensor) -> Tensor:
        raw = self._bytes(part)
        # For the commonest formats this takes a third of the library's time and gives the same bits.
        groups = groups_of(part.kind, raw)
        kind = gguf.GGMLQuantizationType(part.kind)
        numbers = _dequantised(raw, kind) if groups is None else groups.floats().numpy()
        return torch.from_numpy(np.ascontiguousarray(self._as_in_transformers(numbers, part.name)))

    def _as_in_transformers(self, weights: NDArray[Any], name: str) -> NDArray[Any]:
        """Return weights in the order that transformers expects: llama.cpp permutes some, or adds one to them."""
        changed: NDArray[Any] = self._rules.process(weights=weights, name=name).weights
        return changed

    @cached_property
    def _rules(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        return TENSOR_PROCESSORS.get(self._index.architecture, TensorProcessor)(config=self._index.config)


def _dequantised(raw: Bytes, kind: gguf.GGMLQuantizationType) -> NDArray[Any]:
    """Return numbers from their bytes, `[..., bytes of a row]` to `[..., columns]`."""
    unpacked = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    numbers: NDArray[Any] = gguf.dequantize(raw.view(unpacked.get(kind, np.uint8)), kind)
    return numbers
