"""Starts several nodes of this machine from one process: it imports everything once and forks, which takes a fraction of
the time and memory of starting each from scratch. Run as `python -m node.stage_processes`, configurations on standard input.
"""

import os
import sys
import threading
from functools import partial

import msgspec

from node.config import NodeConfig
from node.events import Failed, Started, report


def main() -> None:
    """Fork one node per configuration; end when they have ended, or when standard input does."""
    configs = msgspec.json.decode(sys.stdin.readline(), type=list[NodeConfig])
    # No thread may run before the forks, so modules are imported and nothing is started.
    import node.commands.node
    import node.netlab

    if any(config.recorded is None for config in configs):
        import node.stage_models

    names: dict[int, int] = {}
    for index, config in enumerate(configs):
        pid = os.fork()
        if pid == 0:
            watch_parent()
            if config.namespace:
                node.netlab.enter_namespace(config.namespace)
            os._exit(node.commands.node.serve(config, partial(report, index)))
        names[pid] = index
        report(index, Started(pid=pid))
    watch_parent()
    while names:
        pid, status = os.wait()
        index = names.pop(pid)
        report(index, Failed(text=f"the process ended with code {os.waitstatus_to_exitcode(status)}"))


def watch_parent() -> None:
    """End this process when its standard input does: a pipe that only the parent holds open, however that one dies."""
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
