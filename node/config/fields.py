"""Holds the annotations of a setting. Its help stands beside its name, type and default, and nowhere else."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a setting looks on the command line. flag: its name, if not the field's. metavar: the value's placeholder."""

    flag: str = ""
    metavar: str = ""
    is_positional: bool = False
    is_hidden: bool = False
    is_repeated: bool = False


class Help(str):
    """The help of a setting: a noun phrase without a full stop. The default is added when the help is shown."""

    __slots__ = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings structs."""


Positive = Annotated[int, Meta(ge=1)]
POSITIONAL = Shape(is_positional=True)
FILE = Shape(metavar="FILE")
URL = Shape(metavar="URL")
