"""Reads the command line and runs one command of `dsd`.

`.table` lists the commands. The settings of each command are structs (`node.config`), from which `.flags` makes its
flags. Only the requested command is imported, so that help and a mistyped flag are answered at once.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from dsd_p2p.errors import ConfigError, DsdError, first_cause
from node.cli.flags import add_flags
from node.cli.table import COMMANDS, GROUPS, Command
from node.crash import explain

_DESCRIPTION = "Peer-to-peer LLM inference, fast over distance."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 error here or at a peer, 2 wrong usage, 130 interrupted."""
    # Libraries draw bars of their own. Ours are enough, and without a terminal a bar is thousands of lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    words, command, given = parse(sys.argv[1:] if arguments is None else arguments)
    # Python can lose an interrupt in one of its own callbacks while modules load. Nothing needs cleaning up yet, so die
    # at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run = command.load_run()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from node.config import FlagError, read_configs

    file = given.pop("config", None)
    try:
        code: int = run(*read_configs(command.load_settings(), file if isinstance(file, str) else None, given))
    except BaseException as exc:  # the last place: nothing that happens below may end in a traceback
        match first_cause(exc):
            case KeyboardInterrupt():
                return 130
            case SystemExit():
                raise
            case BrokenPipeError():
                _close_output()
                return 128 + signal.SIGPIPE
            case DsdError() as cause:
                hint = f"; see `dsd {' '.join(words)} --help`" if isinstance(cause, FlagError) else ""
                print(f"dsd {words[0]}: {cause}{hint}", file=sys.stderr)
                return 2 if isinstance(cause, ConfigError) else 1
            case _:
                print(explain(exc, f"dsd {' '.join(words)}"), file=sys.stderr)
                return 1
    return code


def _close_output() -> None:
    """Forget what is left to print: whoever read our output has gone, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(arguments: Sequence[str]) -> tuple[list[str], Command, dict[str, object]]:
    """Return the command's words, the command, and the given flags. Help and usage errors exit the program."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if arguments else 2)
    names = argparse.ArgumentParser(prog="dsd", description=_DESCRIPTION, add_help=False)
    names.add_argument("command", choices=list(COMMANDS))
    name: str = names.parse_args(arguments[:1]).command
    command, words, rest = COMMANDS[name], [name], list(arguments[1:])
    if command.parts:
        parts = argparse.ArgumentParser(prog=f"dsd {name}", description=_sentence(command.help))
        choices = parts.add_subparsers(dest="part", required=True, metavar="WHAT")
        for part, below in command.parts.items():
            choices.add_parser(part, help=below.help, add_help=False)
        part = parts.parse_known_args(rest[:1])[0].part
        command, words, rest = command.parts[part], [name, part], rest[1:]
    return words, command, vars(parser_of(words, command).parse_args(rest))


def parser_of(words: Sequence[str], command: Command) -> argparse.ArgumentParser:
    """Return the parser of one command's flags."""
    parser = argparse.ArgumentParser(
        prog=f"dsd {' '.join(words)}", description=_sentence(command.help), argument_default=argparse.SUPPRESS
    )
    add_flags(parser, command.load_settings())
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, named like the flags; flags win")
    return parser


def overview() -> str:
    """Return the text of `dsd --help`."""
    lines = [_DESCRIPTION, "", "usage: dsd COMMAND [FLAGS]; `dsd COMMAND --help` explains the flags"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12}{command.help}" for name, command in commands.items())]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
