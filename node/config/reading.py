"""Reads settings from a TOML file and from flags. Flags win; unknown keys are refused."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from dsd_p2p.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)

_OLD_NAMES = {"window": "policy"}
_OLD_VALUES = {"policy": {"awc": "learned"}, "policies": {"awc": "learned"}}
_PATH = re.compile(r"^(?P<what>.*) - at `\$\.(?P<name>\w+)")


class FlagError(ConfigError):
    """A flag, or a key of the configuration file, that the command does not know or whose value is invalid."""


def read_config(kind: type[Config], file: str | None, flags: Mapping[str, object]) -> Config:
    """Return the settings. Values in `file` override the defaults, and flags override both.

    Raises:
        ConfigError: the file cannot be read.
        FlagError: a key is unknown, or a value is invalid.
    """
    (config,) = read_configs((kind,), file, flags)
    return config


def read_configs(kinds: tuple[type[Config], ...], file: str | None, flags: Mapping[str, object]) -> tuple[Config, ...]:
    """Return several structs, read from one file and one set of flags.

    Each struct that has a field of a given name gets its value. A name that no struct has goes to the first one, which
    refuses it. Raises as `read_config` does.
    """
    values = {_OLD_NAMES.get(name, name): value for name, value in (_read(file) | dict(flags)).items()}
    values = {name: _renamed(name, value) for name, value in values.items()}
    known = {name for kind in kinds for name in kind.__struct_fields__}
    strange = {name: value for name, value in values.items() if name not in known}
    configs: list[Config] = []
    for kind in kinds:
        own = {name: value for name, value in values.items() if name in kind.__struct_fields__}
        configs.append(_convert(own if configs else own | strange, kind))
    return tuple(configs)


def _read(file: str | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        return tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"config file {file}: {exc}") from exc


def _renamed(name: str, value: object) -> object:
    renamed = _OLD_VALUES.get(name, {})
    if isinstance(value, list | tuple):
        return [renamed.get(str(each), each) for each in value]
    return renamed.get(str(value), value)


def _convert(values: dict[str, object], kind: type[Config]) -> Config:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        if (found := _PATH.match(str(exc))) is None:
            raise FlagError(str(exc)) from exc
        name = found["name"]
        raise FlagError(f"--{name.replace('_', '-')} is {values.get(name)!r}: {found['what'].lower()}") from exc
