"""Hashes a model: one digest per tensor, and one of the whole model for peers to compare."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from dsd_p2p.errors import ModelError
from dsd_p2p.models.cache_dir import default_cache_dir

_FORMAT = 2
"""Raise it when the manifest changes."""

_MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""


class _TensorHeader(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Manifest(msgspec.Struct, frozen=True):
    """The digests of a model's config, files and tensors.

    digest: of the whole content (`content_digest`). tensors: by name, dtype, shape and the sha256 of the bytes.
    """

    digest: str
    tensors: dict[str, str]


def content_digest(config: Path, file_hashes: Iterable[str]) -> str:
    """Return the sha256 of a config, without the fields that differ between copies, and of the weight files' sha256.

    Raises:
        ModelError: the config cannot be read.
    """
    lines = [hashlib.sha256(_canonical_config(config)).hexdigest(), *sorted(file_hashes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, weight_files: Iterable[str]) -> Manifest:
    """Hash the model in `folder`, or return the stored manifest if path, size and time of change of its files match.

    Raises:
        ModelError: a file cannot be read.
    """
    files = [folder / "config.json", *(folder / name for name in sorted(weight_files))]
    try:
        stats = [(path.name, path.stat()) for path in files if path.exists()]
        state = repr([_FORMAT, str(folder.resolve()), *((name, s.st_size, s.st_mtime_ns) for name, s in stats)])
        stored = default_cache_dir() / "manifests" / hashlib.sha256(state.encode()).hexdigest()
        if stored.exists():
            return msgspec.json.decode(stored.read_bytes(), type=Manifest)
        tensors = {name: entry for path in files[1:] for name, entry in _hash_tensors(path)}
        manifest = Manifest(digest=content_digest(files[0], map(file_sha256, files[1:])), tensors=tensors)
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelError(f"{folder}: {exc}: fetch the model again") from exc
    _store(stored, manifest)
    return manifest


def _store(path: Path, manifest: Manifest) -> None:
    """Keep the manifest for the next time. If that fails, the next time only takes longer."""
    # Several processes may do this at once, so each moves a complete file into place.
    scratch = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(msgspec.json.encode(manifest))
        scratch.replace(path)


def check_tensors(manifest: Manifest, folder: Path, file_of_tensor: Mapping[str, str], names: Iterable[str]) -> None:
    """Hash these tensors as they are on disk now, and compare them with the manifest.

    Raises:
        ModelError: a tensor is missing or differs.
    """
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(file_of_tensor[name], set()).add(name)
    for file, tensors in wanted.items():
        found = dict(_hash_tensors(folder / file, tensors))
        for name in sorted(tensors):
            if name not in found or manifest.tensors.get(name) != found[name]:
                raise ModelError(f"{folder / file}: tensor {name} has changed on disk: fetch the model again")


def _hash_tensors(file: Path, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name and manifest entry, reading the file in order without torch or a memory map.

    Raises:
        ModelError: `file` is not a safetensors file.
    """
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_bytes <= _MAX_HEADER_BYTES:
            raise ModelError(f"{file} is not a safetensors file: fetch the model again")
        try:
            header = msgspec.json.decode(stream.read(header_bytes), type=dict[str, msgspec.Raw])
        except msgspec.DecodeError as exc:
            raise ModelError(f"{file} is not a safetensors file ({exc}): fetch the model again") from exc
        header.pop("__metadata__", None)
        for name, raw in header.items():
            if wanted is not None and name not in wanted:
                continue
            tensor = msgspec.json.decode(raw, type=_TensorHeader)
            start, end = tensor.data_offsets
            stream.seek(8 + header_bytes + start)
            digest = hashlib.sha256(stream.read(end - start)).hexdigest()
            yield name, f"{tensor.dtype} {tensor.shape} {digest}"


def _canonical_config(path: Path) -> bytes:
    """Return the config without the fields that differ between copies of one model."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelError(f"{path}: {exc}: fetch the model again") from exc
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    return msgspec.json.encode(config, order="sorted")
