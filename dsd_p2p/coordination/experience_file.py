"""Keeps on disk what was measured of each route and drafter, so that the first answer after a restart begins with it.

Several processes of one machine may share the file: each change reads it again under a lock. A file that cannot be read
or written costs experience, never an answer.
"""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from dsd_p2p.window.tracker import Kept

logger = logging.getLogger(__name__)

_MAX_ENTRIES = 64
_MAX_BYTES = 1 << 20
_LOCK_TIMEOUT_S = 1.0


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """kept_at_s: seconds since 1970."""

    kept_at_s: float
    kept: Kept


# JSON, because it has no NaN: a measurement that is no number makes a file that is not read, and is soon replaced.
_decoder = msgspec.json.Decoder(dict[str, _Entry])


class ExperienceFile:
    """The file at `path`; its latest 64 routes are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, name: Iterable[str]) -> Kept | None:
        """Return what was kept under `name`, or None."""
        entry = self._read().get(_joined(name))
        return entry.kept if entry is not None else None

    def keep(self, name: Iterable[str], kept: Kept) -> None:
        """Keep something under `name`."""
        try:
            with FileLock(f"{self._path}.lock", timeout=_LOCK_TIMEOUT_S):
                entries = self._read() | {_joined(name): _Entry(kept_at_s=time.time(), kept=kept)}
                newest = sorted(entries.items(), key=lambda item: -item[1].kept_at_s)[:_MAX_ENTRIES]
                scratch = self._path.with_name(f".{self._path.name}")
                scratch.write_bytes(msgspec.json.encode(dict(newest)))
                scratch.replace(self._path)
        except (OSError, Timeout) as exc:
            logger.info("experience not kept file=%s error=%s", self._path, exc)

    def _read(self) -> dict[str, _Entry]:
        try:
            if self._path.stat().st_size > _MAX_BYTES:
                return {}
            return _decoder.decode(self._path.read_bytes())
        except (OSError, msgspec.DecodeError):
            return {}


def _joined(name: Iterable[str]) -> str:
    return "\n".join(name)
