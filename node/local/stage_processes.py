"""Starts several stages from one process.

The process imports everything once and then forks, which takes a fraction of the time and memory of separate starts.
Run as `python -m node.local.stage_processes`, with a list of `StageProcess` on standard input.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from node.config import NodeConfig
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
            watch_parent()
            os._exit(serve(partial(report, index)))
        names[pid] = index
        report(index, Started(pid=pid))
    watch_parent()
    while names:
        pid, status = os.wait()
        index = names.pop(pid)
        report(index, Failed(text=f"the process ended with code {os.waitstatus_to_exitcode(status)}"))


if __name__ == "__main__":
    main()
