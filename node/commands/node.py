"""`dsd node`: one stage."""

import logging
import sys

import trio

from dsd_p2p.errors import DsdError
from dsd_p2p.models.source import find_model
from node.config import NodeConfig, read_config
from node.console import ConsoleProgress, console
from node.daemon import run_node
from node.events import Failed, Loading, NodeEvent, Ready, report


def run(options: dict[str, object]) -> int:
    """Serve until stopped."""
    has_parent = bool(options.pop("events", False))
    file = options.pop("config", None)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    try:
        config = read_config(NodeConfig, str(file) if file else None, options)
        with ConsoleProgress() as progress:
            source = find_model(config.model, progress)
        trio.run(run_node, config, source, report if has_parent else _tell_user)
    except (DsdError, BaseExceptionGroup) as exc:
        if has_parent:
            report(Failed(text=_text(exc)))
            return 1
        raise
    return 0


def _text(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def _tell_user(event: NodeEvent) -> None:
    match event:
        case Loading(what=what):
            console.print(f"[dim]{what} …[/]")
        case Ready(address=address, span=span):
            console.print(f"serving layers {span} at")
            print(address, flush=True)
        case Failed(text=text):
            console.print(text)
