"""Implements `dsd completion`: print a script that completes commands and flags in a shell."""

import argparse

import shtab

from node.cli.main import parser_of
from node.cli.table import COMMANDS, Command
from node.config import CompletionConfig


def run(config: CompletionConfig) -> int:
    """Print the script. `eval "$(dsd completion bash)"` loads it."""
    parser = argparse.ArgumentParser(prog="dsd", add_help=False)
    _add_commands(parser, COMMANDS, ())
    print(shtab.complete(parser, shell=config.shell))
    return 0


def _add_commands(parser: argparse.ArgumentParser, commands: dict[str, Command], above: tuple[str, ...]) -> None:
    choices = parser.add_subparsers()
    for name, command in commands.items():
        if command.parts:
            _add_commands(choices.add_parser(name, help=command.help), command.parts, (*above, name))
        else:
            whole = parser_of((*above, name), command)
            choices.add_parser(name, help=command.help, parents=[whole], add_help=False)
