"""Hashes a model: one digest per tensor, and one of the whole model for peers to compare."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from dsd_p2p.errors import ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.checkpoints.base import Checkpoint

_FORMAT = 3
"""Raise it when the manifest changes."""


class Manifest(msgspec.Struct, frozen=True):
    """The digests of a model's config, files and tensors.

    digest: of the whole content (`content_digest`). parts: by file and name, what `Checkpoint.hashes` says.
    """

    digest: str
    parts: dict[str, str]


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


def read_manifest(config: Path, files: Mapping[str, Path], weights: Checkpoint) -> Manifest:
    """Hash a model, or return the stored manifest if path, size and time of change of its files match.

    files: the paths of its weight files by name.

    Raises:
        ModelError: a file cannot be read.
    """
    named = {"config.json": config, **dict(sorted(files.items()))}
    try:
        stats = [(name, str(path.resolve()), path.stat()) for name, path in named.items() if path.exists()]
        state = repr([_FORMAT, *((name, path, s.st_size, s.st_mtime_ns) for name, path, s in stats)])
        stored = default_cache_dir() / "manifests" / hashlib.sha256(state.encode()).hexdigest()
        if stored.exists():
            return msgspec.json.decode(stored.read_bytes(), type=Manifest)
        parts = {f"{file}/{name}": line for file in files for name, line in weights.hashes(file)}
        manifest = Manifest(digest=content_digest(config, map(file_sha256, files.values())), parts=parts)
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelError(f"{config.parent}: {exc}: fetch the model again") from exc
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


def check_parts(
    manifest: Manifest, weights: Checkpoint, path_of: Callable[[str], Path], tensors: Iterable[str]
) -> None:
    """Hash what these tensors are made of, as it is on disk now, and compare it with the manifest.

    Raises:
        ModelError: a part is missing or differs.
    """
    wanted: dict[str, set[str]] = {}
    for tensor in tensors:
        for file, name in weights.parts(tensor):
            wanted.setdefault(file, set()).add(name)
    for file, names in wanted.items():
        found = dict(weights.hashes(file, names))
        for name in sorted(names):
            if name not in found or manifest.parts.get(f"{file}/{name}") != found[name]:
                raise ModelError(f"{path_of(file)}: tensor {name} has changed on disk: fetch the model again")


def _canonical_config(path: Path) -> bytes:
    """Return the config without the fields that differ between copies of one model."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelError(f"{path}: {exc}: fetch the model again") from exc
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    return msgspec.json.encode(config, order="sorted")
