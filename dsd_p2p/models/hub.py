"""Finds models of the Hugging Face hub: what is cached first, file by file, at one commit that is remembered.

How it works. The first use asks the hub for the newest commit, the model's files and their digests, and writes them
down. From then on this commit is used without asking, with or without a network, until the model is pulled again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dsd_p2p.errors import ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.disk import check_space
from dsd_p2p.models.progress import Progress

_SMALL_FILES = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TIMEOUT_S = 30


class HubFile(msgspec.Struct, frozen=True):
    """A weight file of the hub; sha256: as the hub tells it, or empty."""

    num_bytes: int = 0
    sha256: str = ""


class HubModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model at one commit. weights: its safetensors and GGUF files by name."""

    hub_id: str
    revision: str
    weights: Mapping[str, HubFile]

    def folder(self) -> Path:
        """Return the folder with the config and the tokenizer, fetched if they are not cached.

        Raises:
            ModelError: they can neither be found nor fetched.
        """
        from huggingface_hub import snapshot_download

        options = {"revision": self.revision, "allow_patterns": _SMALL_FILES}
        try:
            return Path(snapshot_download(self.hub_id, local_files_only=True, **options))
        except Exception:  # whatever its client raises, it is not in the cache
            return Path(_told(self.hub_id, lambda: snapshot_download(self.hub_id, **options)))

    def fetch(self, name: str) -> Path:
        """Return the path of one file; fetch it if it is not cached.

        Raises:
            ModelError: there is no such file, or it cannot be fetched.
        """
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.hub_id, name, revision=self.revision, local_files_only=True))
        except Exception:  # whatever its client raises, it is not in the cache
            return Path(_told(self.hub_id, lambda: hf_hub_download(self.hub_id, name, revision=self.revision)))

    def _missing(self, names: Sequence[str]) -> list[str]:
        from huggingface_hub import try_to_load_from_cache

        found = {name: try_to_load_from_cache(self.hub_id, name, revision=self.revision) for name in names}
        return [name for name, path in found.items() if not isinstance(path, str)]

    def fetch_all(self, names: Sequence[str], progress: Progress) -> None:
        """Fetch those of these weight files that are not cached, with one step a file.

        Raises:
            ModelError: one of them cannot be fetched, or there is no room for them.
        """
        sizes = {name: self.weights.get(name, HubFile()).num_bytes for name in self._missing(names)}
        total = sum(sizes.values())
        check_space(default_cache_dir(), total, self.hub_id)
        for number, (name, size) in enumerate(sizes.items(), start=1):
            what = f"fetch {self.hub_id} {number}/{len(sizes)}: {size / 1e6:.0f} of {total / 1e6:.0f} MB"
            progress.step(what, 0, 1)
            self.fetch(name)
            progress.step(what, 1, 1)


def fetch_hub_gguf(hub_id: str, wanted: str, progress: Progress) -> Path:
    """Return a GGUF file of the hub, or the first of its parts; fetch it if it is not cached.

    wanted: its format, such as "Q4_K_M", or its name.

    Raises:
        ModelError: there is no such file, or several, or it cannot be fetched.
    """
    model = find_hub_model(hub_id, progress)
    names = [name for name in model.weights if name.endswith(".gguf")]
    found = [name for name in names if name == wanted] or [name for name in names if _is_in_format(name, wanted)]
    if not found:
        offered = ", ".join(names[:_MAX_NAMED]) or "none"
        raise ModelError(f"{hub_id} has no GGUF file of format {wanted}; its GGUF files: {offered}")
    if len({_PART.sub("", name) for name in found}) > 1:
        raise ModelError(f"{hub_id} has several GGUF files of format {wanted}: name one of {', '.join(found)}")
    model.fetch_all(sorted(found), progress)
    return model.fetch(min(found))


_MAX_NAMED = 20
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


def _is_in_format(name: str, wanted: str) -> bool:
    """Return whether a file's name says that it is in a format: `model-Q4_K_M.gguf`, `model.q4_k_m-00001-of-00002.gguf`."""
    return bool(
        re.search(rf"(?:^|[-._]){re.escape(wanted)}$", _PART.sub("", name).removesuffix(".gguf"), re.IGNORECASE)
    )


def find_hub_model(hub_id: str, progress: Progress, *, is_newest: bool = False) -> HubModel:
    """Return the model at the commit that was used before, or at the newest one.

    is_newest: ask the hub even if a commit was used before.

    Raises:
        ModelError: no commit is known, and the hub does not answer.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    path = default_cache_dir() / "hub" / f"{hub_id.replace('/', '--')}.json"
    if not is_newest:
        try:
            model = msgspec.json.decode(path.read_bytes(), type=HubModel)
        except (OSError, msgspec.DecodeError):
            pass
        else:
            progress.step(f"use {hub_id} at its commit {model.revision[:12]}", 1, 1)
            return model
    model = _ask(hub_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(model))
    except OSError as exc:
        raise ModelError(f"{path}: {exc.strerror}; set XDG_CACHE_HOME to a folder that can be written") from exc
    return model


def _ask(hub_id: str) -> HubModel:
    from huggingface_hub import HfApi

    info = _told(hub_id, lambda: HfApi().model_info(hub_id, files_metadata=True, timeout=_TIMEOUT_S))
    weights = {
        file.rfilename: HubFile(num_bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or ()
        if file.rfilename.endswith((".safetensors", ".gguf")) and "/" not in file.rfilename
    }
    return HubModel(hub_id=hub_id, revision=info.sha or "main", weights=weights)


def _told(hub_id: str, ask: Callable[[], Any]) -> Any:
    """Return the hub's answer, or raise ModelError with its reason in one line."""
    try:
        return ask()
    except Exception as exc:  # its client raises errors of several libraries
        reason = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise ModelError(
            f"{hub_id}: it is not in the cache, and the Hugging Face hub does not give it: {reason[:200]}"
        ) from exc
