"""`dsd node`: one stage."""

import logging
import sys
from collections.abc import Callable
from functools import partial

import trio

from dsd_p2p.errors import DsdError, first_cause
from node.config import NodeConfig, read_config
from node.console import ConsoleProgress, console
from node.daemon import LoadStage, run_node
from node.events import Failed, Loading, NodeEvent, Ready
from node.stage_processes import watch_parent


def run(options: dict[str, object]) -> int:
    """Serve until stopped."""
    if options.pop("exit_with_parent", False):
        watch_parent()
    file = options.pop("config", None)
    return serve(read_config(NodeConfig, str(file) if file else None, options), _tell_user)


def serve(config: NodeConfig, report: Callable[[NodeEvent], None]) -> int:
    """Serve until stopped; what keeps the node from it is reported. Returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    try:
        trio.run(run_node, config, loader_of(config), report)
    except (DsdError, BaseExceptionGroup) as exc:
        if not isinstance(cause := first_cause(exc), DsdError):
            raise
        report(Failed(text=str(cause)))
        return 1
    return 0


def loader_of(config: NodeConfig) -> LoadStage:
    """Return what loads the configured stage; torch is imported only where a real model needs it.

    Raises:
        ModelError: the model cannot be had.
    """
    if config.recorded is not None:
        from node.recorded import load_recorded

        return load_recorded
    from dsd_p2p.models.source import find_model
    from node.stage_models import load_span_of

    with ConsoleProgress() as progress:
        return partial(load_span_of, find_model(config.model, progress))


def _tell_user(event: NodeEvent) -> None:
    match event:
        case Loading(what=what):
            console.print(f"[dim]{what} …[/]")
        case Ready(address=address, span=span):
            console.print(f"serving layers {span} at")
            print(address, flush=True)
        case Failed(text=text):
            print(f"dsd node: {text}", file=sys.stderr)
        case _:
            pass
