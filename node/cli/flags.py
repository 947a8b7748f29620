"""Builds a command line from the settings structs of a command (`node.config.fields`)."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from node.config.fields import Help, Shape

Kinds = Sequence[type[msgspec.Struct]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a struct, as the command line needs it. kind: int, float, bool or str. choices: allowed values."""

    name: str
    help: str
    shape: Shape
    kind: type
    choices: tuple[str, ...]
    is_list: bool
    default: object
    is_required: bool

    @property
    def flag(self) -> str:
        """The setting's name on the command line."""
        return self.shape.flag or f"--{self.name.replace('_', '-')}"

    @property
    def shown_help(self) -> str:
        """The help, followed by the default if that is informative."""
        default = self.default
        if self.is_required or self.kind is bool or default is None or default in ("", ()):
            return self.help
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        return f"{self.help} (default {shown})"


def settings_of(kinds: Kinds) -> Iterator[Setting]:
    """Yield the settings of the structs. A name that several structs have comes once, from the first of them."""
    seen: set[str] = set()
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            if field.name not in seen:
                seen.add(field.name)
                yield _setting(field, hints[field.name])


def add_flags(parser: argparse.ArgumentParser, kinds: Kinds) -> None:
    """Add a flag or a positional argument for each setting. Settings that are not given are absent from the result."""
    for setting in settings_of(kinds):
        _add(parser, setting)


def _add(parser: argparse.ArgumentParser, setting: Setting) -> None:
    options: dict[str, Any] = {"help": setting.shown_help, "default": argparse.SUPPRESS}
    if setting.shape.is_hidden:
        options["help"] = argparse.SUPPRESS
    if setting.kind is bool:
        # A flag switches on what is off by default; --no-… switches off what is on by default.
        action = argparse.BooleanOptionalAction if setting.default else "store_true"
        parser.add_argument(setting.flag, dest=setting.name, action=action, **options)
        return
    if setting.shape.is_positional:
        options |= {"nargs": "+" if setting.is_list else None if setting.is_required else "?"}
        if not setting.is_required:
            # argparse would check its own SUPPRESS marker against the choices.
            options["default"] = setting.default
        parser.add_argument(setting.name, choices=setting.choices or None, **options)
        return
    if setting.is_list and setting.shape.is_repeated:
        options |= {"action": "append"}
    elif setting.is_list:
        options |= {"type": _list_of(setting)}
    else:
        options |= {"type": setting.kind, "choices": setting.choices or None}
    options |= {"metavar": setting.shape.metavar or None, "dest": setting.name, "required": setting.is_required}
    names = [setting.flag, "--window"] if setting.name == "policy" else [setting.flag]
    parser.add_argument(*names, **options)


def _list_of(setting: Setting) -> Any:
    def comma_list(text: str) -> list[Any]:
        try:
            parts = [setting.kind(part) for part in text.split(",") if part]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers separated by commas") from None
        if wrong := [part for part in parts if setting.choices and part not in setting.choices]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}: choose from {', '.join(setting.choices)}")
        return parts

    return comma_list


def _setting(field: msgspec.structs.FieldInfo, annotation: Any) -> Setting:
    plain, notes = _unwrap(annotation)
    is_list = get_origin(plain) is tuple
    if is_list:
        plain, inner = _unwrap(get_args(plain)[0])
        notes = [*notes, *inner]
    choices: tuple[str, ...] = ()
    if get_origin(plain) is Literal:
        choices, plain = tuple(map(str, get_args(plain))), str
    elif issubclass(plain, StrEnum):
        choices, plain = tuple(each.value for each in plain), str
    return Setting(
        name=field.name,
        help=next((str(note) for note in notes if isinstance(note, Help)), ""),
        shape=next((note for note in notes if isinstance(note, Shape)), Shape()),
        kind=plain,
        choices=choices,
        is_list=is_list,
        default=None if field.required else field.default,
        is_required=field.required,
    )


def _unwrap(annotation: Any) -> tuple[Any, list[object]]:
    """Return a type without its annotations and without `None`, and the annotations, outermost first."""
    notes: list[object] = []
    while True:
        if get_origin(annotation) is Annotated:
            notes += annotation.__metadata__
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, UnionType):
            (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
        else:
            return annotation, notes
