"""Writes the flag reference of docs/operations.md from the settings. Run as `python -m node.cli.reference`."""

import sys
from pathlib import Path

from node.cli.flags import Setting, settings_of
from node.cli.table import COMMANDS

PAGE = Path("docs/operations.md")
_BEGIN, _END = "<!-- flags: made by python -m node.cli.reference -->", "<!-- end of flags -->"
_COMMANDS = ("up", "create", "join", "node", "generate", "top", "invite")


def reference() -> str:
    """Return the tables of the flags that a person who runs a swarm needs."""
    tables = (_table([*settings_of(COMMANDS[name].load_settings())]) for name in _COMMANDS)
    return "\n\n".join(f"### `dsd {name}`\n\n{table}" for name, table in zip(_COMMANDS, tables, strict=True))


def with_reference(page: str) -> str:
    """Return the page with its tables replaced by current ones."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{reference()}\n\n{_END}{after}"


def _table(settings: list[Setting]) -> str:
    return "\n".join(["| flag | what |", "|---|---|", *(_row(each) for each in settings if not each.shape.is_hidden)])


def _row(setting: Setting) -> str:
    name = setting.name.upper() if setting.shape.is_positional else setting.flag
    if setting.kind is bool and setting.default:
        name = f"--no-{setting.flag.removeprefix('--')}"
    choices = f" ({', '.join(setting.choices)})" if setting.choices else ""
    return f"| `{name}` | {setting.shown_help.replace('%%', '%').replace('|', chr(92) + '|')}{choices} |"


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text()))
    sys.exit(0)
