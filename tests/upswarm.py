"""A real `dsd up` for tests: stage processes, gateway, broker, ended with the block."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START_S = 120


@dataclass(frozen=True)
class Up:
    url: str
    mqtt: str
    pid: int
    address: str


@contextmanager
def dsd_up(*flags: str, env: dict[str, str] | None = None) -> Iterator[Up]:
    process = subprocess.Popen(
        [sys.executable, "-m", "node.cli", "up", "--port", "0", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        start_new_session=True,
    )
    try:
        yield _wait(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)
        process.stdout.close()
        process.stderr.close()


def _wait(process: subprocess.Popen) -> Up:
    deadline, url, mqtt = time.monotonic() + START_S, "", ""
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"dsd up ended: {process.stderr.read()[-2000:]}")
        url = url or (found.group(1) if (found := re.search(r"browser: +(http://[^/]+)/", line)) else "")
        mqtt = mqtt or (found.group(1) if (found := re.search(r"telemetry: +(mqtts?://\S+)", line)) else "")
        if found := re.search(r"--connect (\S+)", line):
            return Up(url, mqtt, process.pid, found.group(1))
    raise AssertionError("dsd up did not start in time")
