"""Defines where this program keeps what it must not lose."""

import os
from pathlib import Path


def state_dir() -> Path:
    """Return `$XDG_STATE_HOME/dsd-p2p`, by default `~/.local/state/dsd-p2p`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dsd-p2p"
