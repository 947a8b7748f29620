"""Defines where models are cached on disk."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/dsd-p2p`, by default `~/.cache/dsd-p2p`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsd-p2p"
