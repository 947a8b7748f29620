"""Reads and writes the thresholds file of relaxed mode, which `dsd calibrate` makes."""

import functools
from importlib.resources import files
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import Relaxation


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds of relaxed mode with their provenance.

    budget_nats: allowed loss of the target's mean log-likelihood per token, which is also the relaxation's own budget.
    loss_nats, relaxed_share: the loss with these thresholds, and the share of tokens that they relax, both measured on
        the texts of `prompts`.
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
    """The content of the file: `Thresholds`, with each threshold under its name."""

    relaxation: dict[str, float | str]
    provenance: dict[str, float | int | str]


def bundled_thresholds() -> Path:
    """Return the path of the thresholds that come with the project."""
    return Path(str(files("node").joinpath("data/relaxation.json")))


def bundled_relaxation(budget: float) -> Relaxation:
    """Return the bundled thresholds with another budget, in nats a token."""
    return msgspec.structs.replace(_bundled(), budget=budget)


@functools.cache
def _bundled() -> Relaxation:
    return read_thresholds(bundled_thresholds()).relaxation


def write_thresholds(thresholds: Thresholds, path: Path) -> None:
    """Write the thresholds as JSON that people can read and edit."""
    content = _File(
        relaxation=msgspec.structs.asdict(thresholds.relaxation),
        provenance={name: value for name, value in msgspec.structs.asdict(thresholds).items() if name != "relaxation"},
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def read_thresholds(path: Path) -> Thresholds:
    """Return the thresholds in the file `path`.

    Raises:
        ConfigError: the file cannot be read, or a threshold is out of range.
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
