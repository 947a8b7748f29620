"""Writes measurements to receipts: medians with their range, the machine and the commit."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
from rich.table import Table

from node.console import console

RECEIPTS = Path("docs/benchmarks")


class Sample(msgspec.Struct):
    """Median and range of one arm's repetitions."""

    median: float
    low: float
    high: float
    values: list[float]


def sample(values: Sequence[float]) -> Sample:
    """Return the median and range of `values`."""
    return Sample(median=median(values), low=min(values), high=max(values), values=list(values))


def machine() -> dict[str, object]:
    """Return the facts about this machine that a reader needs to judge a timing."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": _gpu(),
    }


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed command
    except OSError:
        return None
    return result.stdout.strip() or None


def write_receipt(
    name: str, benchmark: str, results: dict[str, object], machine_before: dict[str, object], program: str = "dsd"
) -> Path:
    """Write `docs/benchmarks/NAME.json` and return its path. program: the program that the receipt's command names."""
    receipt = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": " ".join([program, *sys.argv[1:]]),
        "machine": machine_before,
        "results": results,
    }
    RECEIPTS.mkdir(parents=True, exist_ok=True)
    path = RECEIPTS / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(receipt), indent=1) + b"\n")
    console.print(f"receipt: {path}")
    return path


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people, on standard error."""
    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed command
    return result.stdout.strip() or "unknown"
