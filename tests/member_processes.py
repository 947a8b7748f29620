"""Shared by several tests."""

import subprocess
import sys
import time
from contextlib import contextmanager

import msgspec

from node.member.control import PeerReport

DSD = [sys.executable, "-m", "node.cli"]


SERVE = ["--listen", "/ip4/127.0.0.1/tcp/0", "--heartbeat", "0.5s", "--cache-memory", "50MB"]


def dsd(*arguments, check=True, timeout_s=90):
    result = subprocess.run(
        [*DSD, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


@contextmanager
def running(*arguments, log):
    """A node, once it serves; yields its process."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*DSD, *map(str, arguments), *SERVE], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            deadline = time.monotonic() + 60
            line = ""
            while "/p2p/" not in line and time.monotonic() < deadline and process.poll() is None:
                line = process.stdout.readline()
            assert "/p2p/" in line, log.read_text()
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def status(swarm) -> PeerReport:
    return msgspec.json.decode(dsd("members", "--swarm", swarm, "--json").stdout, type=PeerReport)


def alive(swarm):
    return {member.peer for member in status(swarm).members if member.is_alive}


def wait_until(claim, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)
