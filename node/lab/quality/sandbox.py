"""Runs a program that a model wrote: a process of its own, without network, in an empty folder, with hard limits.

It may still read and write what the user may: run untrusted models as a user, or in a container, of their own.
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
    """True when `program` ends by itself with exit code 0 within the limits."""
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
            # What it forked, too: all are in the session that it was started in.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@cache
def _without_network() -> list[str]:
    """A network namespace without interfaces, where this user may make one."""
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
