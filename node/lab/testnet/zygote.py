"""Imports everything once and forks a process for each command on standard input: a killed node is back in a second.

Run as `python -m node.lab.testnet.zygote`; it ends, and everything it forked with it, when standard input does.
"""

import ctypes
import logging
import os
import signal
import sys
from functools import partial

import msgspec

from node.lab.testnet.events import Command, StartClient, StartNode
from node.local.events import Failed, Started
from node.local.pipe import report

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork until standard input ends."""
    # No thread may run before the forks, so modules are imported and nothing is started.

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    decoder = msgspec.json.Decoder(Command)
    for line in sys.stdin.buffer:
        command = decoder.decode(line)
        pid = os.fork()
        if pid == 0:
            _become(command)
        report(command.index, Started(pid=pid))


def _become(command: StartNode | StartClient) -> None:
    """Be that process, and end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    code = 1
    try:
        code = _run(command)
    except BaseException as exc:  # task boundary: a forked process must never go on as its parent
        logging.getLogger(__name__).exception("process failed index=%d", command.index)
        report(command.index, Failed(text=repr(exc)[:500]))
    finally:
        os._exit(code)


def _run(command: StartNode | StartClient) -> int:
    from node.lab.slow import SlowMachine
    from node.lab.testnet.client import run_client
    from node.local.netlab import enter_namespace
    from node.member.process import serve_swarm

    match command:
        case StartNode(index=index, config=config, namespace=name, slowdown=slowdown):
            if name:
                enter_namespace(name)
            return serve_swarm(config, partial(report, index), machine=SlowMachine(slowdown))
        case StartClient(namespace=name):
            if name:
                enter_namespace(name)
            return run_client(command)


if __name__ == "__main__":
    main()
