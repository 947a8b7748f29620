"""The configuration reference of docs/operations.md, made from the code: `python -m node.cli.reference` writes it anew."""

import argparse
import sys
from pathlib import Path

from node.cli.main import command_parsers

PAGE = Path("docs/operations.md")
_BEGIN, _END = "<!-- flags: made by python -m node.cli.reference -->", "<!-- end of flags -->"
_COMMANDS = ("up", "create", "join", "node", "generate", "top", "invite")


def reference() -> str:
    """Return the tables of the flags that a person who runs a swarm needs."""
    parsers = command_parsers()
    return "\n\n".join(f"### `dsd {name}`\n\n{_table(parsers[name])}" for name in _COMMANDS)


def with_reference(page: str) -> str:
    """Return the page with the tables as the code has them."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{reference()}\n\n{_END}{after}"


def _table(parser: argparse.ArgumentParser) -> str:
    rows = ["| flag | what |", "|---|---|"]
    for action in parser._actions:
        if action.help in (argparse.SUPPRESS, None) or action.dest == "help":
            continue
        name = " ".join(f"`{option}`" for option in action.option_strings) or f"`{action.dest.upper()}`"
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        rows.append(f"| {name} | {str(action.help).replace('%%', '%').replace('|', chr(92) + '|')}{choices} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text()))
    sys.exit(0)
