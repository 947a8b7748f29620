"""The file that `dsd calibrate` writes and relaxed mode reads: thresholds with their provenance."""

from importlib.resources import files
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import Relaxation


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds, and what they were found on.

    budget_nats: the most mean log-likelihood of the target a token may lose. loss_nats, relaxed_share: what these thresholds lose
        and let stand on the thresholds texts.
    """

    relaxation: Relaxation
    target: str
    drafter: str
    dtype: str
    prompts: str
    num_positions: int
    budget_nats: float
    loss_nats: float
    relaxed_share: float
    command: str
    date: str


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The same, with names instead of places for the thresholds."""

    relaxation: dict[str, float | str]
    provenance: dict[str, float | int | str]


def bundled_thresholds() -> Path:
    """Return the thresholds that the project brings along."""
    return Path(str(files("node").joinpath("data/relaxation.json")))


def write_thresholds(thresholds: Thresholds, path: Path) -> None:
    """Write it as JSON that people can read and edit."""
    content = _File(
        relaxation=msgspec.structs.asdict(thresholds.relaxation),
        provenance={name: value for name, value in msgspec.structs.asdict(thresholds).items() if name != "relaxation"},
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def read_thresholds(path: Path) -> Thresholds:
    """Return what is in `path`.

    Raises:
        ConfigError: it cannot be read, or a threshold is out of range.
    """
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
        values = tuple(content.relaxation[name] for name in Relaxation.__struct_fields__)
        return Thresholds(
            relaxation=msgspec.convert(values, Relaxation),
            **msgspec.convert(content.provenance, dict[str, object]),  # type: ignore[arg-type]
        )
    except (OSError, KeyError, TypeError, msgspec.DecodeError) as exc:
        raise ConfigError(f"relaxation file {path}: {exc}; make one with `dsd calibrate`") from exc
