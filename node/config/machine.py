"""Finds out what this machine, or the container that we are in, can give: cores, memory and an accelerator."""

import functools
import os
import sys
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OURS = ("node.cli", "node.local.stage_processes")


@functools.cache
def auto_device() -> str:
    """Return the torch device to compute on: cuda if there is a card that torch can use, else cpu."""
    if sys.platform == "linux" and not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"  # without the seconds that importing torch takes
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def auto_threads(num_processes: int) -> int:
    """Return how many threads each of `num_processes` of ours should use, those beside them included.

    `OMP_NUM_THREADS` decides if it is set.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return max(1, num_cores() // (num_processes + _num_others()))


def num_cores() -> int:
    """Return how many cores this process may use, by its affinity and by the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_bytes() -> int:
    """Return the memory that this process can still take: the least of the machine's and its cgroup's."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdecimal() and used.isdecimal():
        # What the kernel caches for us counts as used, and is given back when we need it.
        cached = next(
            (
                int(line.split()[1])
                for line in _read(_CGROUP / "memory.stat").splitlines()
                if line.startswith("inactive_file ")
            ),
            0,
        )
        available = min(available, max(0, int(limit) - int(used) + cached))
    return available


def _num_others() -> int:
    """Return how many other processes of ours run on this machine, stages included."""
    mine = {process.pid for process in [psutil.Process(), *psutil.Process().parents()]}
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_ours = any(each in words for each in _OURS) or any(Path(word).name == "dsd" for word in words[:2])
        found += is_ours and process.pid not in mine
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
