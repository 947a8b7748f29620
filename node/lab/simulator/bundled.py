"""Finds scenarios: files, and those that the program brings along."""

from pathlib import Path

import node
from dsd_p2p.errors import ConfigError

_BUNDLED = Path(node.__file__).parent / "data/scenarios"


def find_scenario(name: str) -> Path:
    """Return the file of a scenario.

    name: a path, or the name of a bundled one.

    Raises:
        ConfigError: there is no such scenario.
    """
    path, bundled = Path(name), _BUNDLED / f"{name}.toml"
    if path.is_file():
        return path
    if bundled.is_file():
        return bundled
    names = ", ".join(sorted(each.stem for each in _BUNDLED.glob("*.toml")))
    raise ConfigError(f"no scenario {name!r}: give a TOML file or one of {names}")
