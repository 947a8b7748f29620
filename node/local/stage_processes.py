"""Starts several stages from one process.

The process imports everything once and then forks, which takes a fraction of the time and memory of separate starts.
Run as `python -m node.local.stage_processes`, with a list of `StageProcess` on standard input.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import msgspec

from node.config import NodeConfig
from node.crash import explain
from node.local.events import Failed, StageEvent, Started
from node.local.pipe import report
from node.parent import watch_parent

Serve = Callable[[Callable[[StageEvent], None]], int]
"""Serves one stage until stopped, reports its events and returns the exit code."""


class StageProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One stage process. namespace: the network namespace to enter (`node.local.netlab`); empty: stay in ours."""

    config: NodeConfig
    namespace: str = ""


def main() -> None:
    """Fork one stage of a real model for each entry on standard input."""
    processes = msgspec.json.decode(sys.stdin.readline(), type=list[StageProcess])
    # No thread may run before the forks, so import the modules but start nothing.
    import node.local.netlab
    import node.local.stage_models
    from node.local.stage_node import serve

    def serve_one(process: StageProcess, tell: Callable[[StageEvent], None]) -> int:
        if process.namespace:
            node.local.netlab.enter_namespace(process.namespace)
        return serve(process.config, tell)

    fork_each([partial(serve_one, process) for process in processes])


def fork_each(stages: Sequence[Serve]) -> None:
    """Fork one process per stage and return when all have ended. All end when standard input ends."""
    names: dict[int, int] = {}
    for index, serve in enumerate(stages):
        pid = os.fork()
        if pid == 0:
            _serve_and_exit(index, serve)
        names[pid] = index
        report(index, Started(pid=pid))
    watch_parent()
    while names:
        pid, status = os.wait()
        report(names.pop(pid), Failed(text=_ending(os.waitstatus_to_exitcode(status))))


def _serve_and_exit(index: int, serve: Serve) -> NoReturn:
    """Serve in a forked process, and never return to the code of its parent."""
    code = 1
    try:
        watch_parent()
        code = serve(partial(report, index))
    except Exception as exc:  # process boundary
        report(index, Failed(text=explain(exc, f"stage {index}")))
    finally:
        os._exit(code)


def _ending(code: int) -> str:
    """Return how a process ended, in words."""
    if code == -signal.SIGKILL:
        return "the process was killed: the system does that when memory runs out, so start fewer stages or a smaller model"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with code {code} and said no reason"


if __name__ == "__main__":
    main()
