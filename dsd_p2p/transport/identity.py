"""Keeps a peer's persistent secret: 32 random bytes in a file that only its owner can read."""

import os
import secrets
from pathlib import Path

from dsd_p2p.errors import ConfigError

SEED_BYTES = 32


def load_or_create_seed(path: Path) -> bytes:
    """Return the ed25519 seed in `path`; create the file on first use, with mode 0600.

    Raises:
        ConfigError: the file is not a seed, is readable by others, or cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SEED_BYTES))
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"identity {path}: other users can read the file; run `chmod 600 {path}`")
        seed = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"identity {path}: {exc.strerror}; choose another with --identity") from exc
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"identity {path}: expected {SEED_BYTES} bytes, got {len(seed)}; move the file away or choose another with --identity"
        )
    return seed
