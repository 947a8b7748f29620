"""Runs a program that a model wrote in a process of its own: no network, an empty folder, hard limits.

The program can still read and write every file that the user can, and it keeps the network where this user may make no
network namespace. Run untrusted models as a separate user or in a container.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache

_CPU_S = 8
_WALL_S = 12.0
_MEMORY_BYTES = 1 << 30
_FILE_BYTES = 1 << 20
_MAX_PROCESSES = 64


def passes(program: str) -> bool:
    """Return whether `program` exits by itself with code 0 within the limits."""
    with tempfile.TemporaryDirectory(prefix="dsd-sandbox-") as folder:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter; what it runs is confined below
            [*_without_network(), sys.executable, "-I", "-S", "-c", program],
            cwd=folder,
            env={"HOME": folder, "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_limit,
            start_new_session=True,
        )
        try:
            return process.wait(_WALL_S) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            # Also kill the processes that it forked: all are in the session that it was started in.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@cache
def _without_network() -> list[str]:
    """Return the command prefix for a network namespace without interfaces, empty if this user may not make one."""
    command = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    try:
        is_allowed = subprocess.run([*command, "true"], check=False, capture_output=True, timeout=5).returncode == 0  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return command if is_allowed else []


def _limit() -> None:
    for what, limit in (
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _MAX_PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
