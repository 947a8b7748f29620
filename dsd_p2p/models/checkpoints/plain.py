"""Reads safetensors files whose tensors are numbers, not packed bits."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Part, PathOf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class _TensorHeader(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class PlainCheckpoint:
    """The tensors of one or several safetensors files. file_of: the file of each tensor."""

    def __init__(self, file_of: Mapping[str, str], path_of: PathOf) -> None:
        self._file_of = file_of
        self._path_of = path_of

    @classmethod
    def read(cls, name: str, path_of: PathOf, *, has_index: bool) -> "PlainCheckpoint":
        """Return the checkpoint of the model called `name`. has_index: its tensors lie in several files.

        Raises:
            ModelError: the files cannot be read.
        """
        try:
            if has_index:
                files = msgspec.json.decode(path_of(INDEX).read_bytes(), type=_WeightIndex).weight_map
                if any("/" in file or "\\" in file or file.startswith(".") for file in files.values()):
                    raise ModelError(f"weights of {name}: {INDEX} names files outside the model's folder")
                return cls(files, path_of)
            with safe_open(path_of(SINGLE), "pt") as weights:
                return cls(dict.fromkeys(weights.keys(), SINGLE), path_of)
        except (SafetensorError, msgspec.DecodeError, OSError) as exc:
            raise ModelError(f"weights of {name}: {exc}; fetch them again") from exc

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._file_of.keys()

    @property
    def num_params(self) -> None:
        """Nothing: the sizes of the files tell."""

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return where tensor `name` lies."""
        return ((self._file_of[name], name),)

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Yield slices of memory-mapped files, which are read when they are used."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            tensors = {}
            for name in names:
                file = self._file_of[name]
                if file not in files:
                    files[file] = stack.enter_context(safe_open(self._path_of(file), "pt"))
                tensors[name] = files[file].get_slice(name)
            yield tensors

    @property
    def is_quantised(self) -> bool:
        """False: every number stands for itself."""
        return False

    def groups(self, name: str) -> None:
        """Return None: every number stands for itself."""
        del name

    def rows(self, name: str) -> None:
        """Return None: these files are read by whole tensors."""
        del name

    def hashes(self, file: str, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield each tensor's name and description, reading the file in order without torch or a memory map.

        Raises:
            ModelError: `file` is not a safetensors file.
        """
        start_bytes, headers = self._headers(file)
        with self._path_of(file).open("rb") as stream:
            for name, header in headers.items():
                if wanted is None or name in wanted:
                    start, end = header.data_offsets
                    stream.seek(start_bytes + start)
                    digest = hashlib.sha256(stream.read(end - start)).hexdigest()
                    yield name, f"{header.dtype} {header.shape} {digest}"

    def _headers(self, file: str) -> tuple[int, dict[str, _TensorHeader]]:
        """Return where the tensors begin in `file`, and their headers."""
        path = self._path_of(file)
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 0 < header_bytes <= _MAX_HEADER_BYTES:
                raise ModelError(f"{path} is not a safetensors file: fetch the model again")
            try:
                header = msgspec.json.decode(stream.read(header_bytes), type=dict[str, msgspec.Raw])
                header.pop("__metadata__", None)
                headers = {name: msgspec.json.decode(raw, type=_TensorHeader) for name, raw in header.items()}
            except msgspec.DecodeError as exc:
                raise ModelError(f"{path} is not a safetensors file ({exc}): fetch the model again") from exc
        return 8 + header_bytes, headers
