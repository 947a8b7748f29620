"""Finds the swarm's model on this machine and checks that it is the swarm's."""

from pathlib import Path

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from node.member.state import StoredMembership


def absolute_model(name: str) -> str:
    """Return the model's name as it means the same from every folder."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def find_member_model(stored: StoredMembership, progress: Progress) -> ModelSource:
    """Return the model that this machine has for the swarm.

    Raises:
        ConfigError: it is a folder or file that this machine does not have.
        ModelError: it cannot be read, or its content differs from the swarm's.
    """
    path = Path(stored.model)
    if path.is_absolute() and not path.exists():
        what = "file" if path.suffix == ".gguf" else "folder"
        raise ConfigError(
            f"the swarm's model is the {what} {path} of the machine that created the swarm: copy it to this machine and "
            f"join again with --model {what.upper()}{_named(stored.digest)}"
        )
    source = find_model(stored.model, progress)
    if stored.digest and source.digest() != stored.digest:
        raise ModelError(
            f"{stored.model} is another model here than in the swarm: its digest is {source.digest()[:12]}, the swarm's "
            f"{stored.digest[:12]}; copy or pull it again, or join with --model FOLDER"
        )
    return source


def _named(digest: str) -> str:
    return f"; its digest is {digest[:12]}" if digest else ""
