"""What a setting says about itself: its help stands beside its name, type and default, and nowhere else."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a setting looks on the command line. flag: another name than the field's. metavar: what stands for its value."""

    flag: str = ""
    metavar: str = ""
    is_positional: bool = False
    is_hidden: bool = False
    is_repeated: bool = False


class Help(str):
    """The help of a setting: one sentence without a full stop; the default is added where it is shown."""

    __slots__ = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that a command can be told."""


Positive = Annotated[int, Meta(ge=1)]
POSITIONAL = Shape(is_positional=True)
FILE = Shape(metavar="FILE")
URL = Shape(metavar="URL")
