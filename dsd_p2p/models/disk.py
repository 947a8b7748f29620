"""Checks that a model fits on the disk before it is fetched."""

import shutil
from pathlib import Path

from dsd_p2p.errors import ModelError


def check_space(folder: Path, num_bytes: int, what: str) -> None:
    """Check that `folder` exists, can be written to, and has room.

    Raises:
        ModelError: says what is missing and where.
    """
    hint = "free some space, or set XDG_CACHE_HOME to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as exc:
        raise ModelError(
            f"{what}: {folder}: {exc.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from exc
    if free_bytes < num_bytes:
        raise ModelError(
            f"{what} needs {num_bytes / 1e9:.1f} GB in {folder}, which has {free_bytes / 1e9:.1f} GB free: {hint}"
        )
