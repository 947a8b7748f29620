"""Defines where models are cached on disk."""

from pathlib import Path


def default_cache_dir() -> Path:
    """Return `~/.cache/dsd-p2p`."""
    return Path.home() / ".cache" / "dsd-p2p"
