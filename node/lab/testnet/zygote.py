"""Forks a process for each command on standard input.

All modules are already imported, so a killed peer is back within a second.

Run as `python -m node.lab.testnet.zygote`. When standard input ends, it ends with everything that it forked.
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
    """Read and run commands until standard input ends."""
    # No thread may run before a fork, so importing must not start one.

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    decoder = msgspec.json.Decoder(Command)
    for line in sys.stdin.buffer:
        command = decoder.decode(line)
        pid = os.fork()
        if pid == 0:
            _become(command)
        report(command.index, Started(pid=pid))


def _become(command: StartNode | StartClient) -> None:
    """Become the process of a command, and exit when it ends."""
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
        case StartNode(index=index, config=config, namespace=name, slowdown=slowdown, gateway=gateway):
            if name:
                enter_namespace(name)
            return serve_swarm(config, partial(report, index), gateway, machine=SlowMachine(slowdown))
        case StartClient(namespace=name):
            if name:
                enter_namespace(name)
            return run_client(command)


if __name__ == "__main__":
    main()
