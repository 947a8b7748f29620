"""A swarm of `dsd node` processes on this machine, ended with the block that started them."""

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from dsd_p2p.errors import ModelError
from dsd_p2p.models.progress import Progress
from dsd_p2p.types import Span
from node.config import SwarmFlags
from node.events import Failed, Loading, Ready, parse

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 5.0


@asynccontextmanager
async def local_swarm(config: SwarmFlags, spans: Sequence[Span], progress: Progress) -> AsyncIterator[list[str]]:
    """Start one process per span; yields their addresses, in order, once all of them serve.

    A child that dies later is seen by whoever talks to it. Children end with the block, and also when this process is killed:
    each watches its standard input, a pipe whose other end is ours.

    Raises:
        ModelError: a child could not start: says why.
    """
    processes: list[trio.Process] = []
    try:
        for span in spans:
            processes.append(await _start(config, span))
        addresses: list[str] = [""] * len(spans)
        with trio.move_on_after(_START_TIMEOUT_S) as scope:
            async with trio.open_nursery() as nursery:
                for index, process in enumerate(processes):
                    nursery.start_soon(_wait_ready, process, index, addresses, progress)
        if scope.cancelled_caught:
            raise ModelError(f"a stage did not start within {_START_TIMEOUT_S:g} s: is the machine out of memory?")
        yield addresses
    finally:
        await _stop(processes)


async def _start(config: SwarmFlags, span: Span) -> trio.Process:
    flags = {
        "model": config.model,
        "dtype": config.dtype,
        "device": config.device,
        "threads": str(config.threads),
        "cache-memory": config.cache_memory,
        "link": config.link,
        "rate": config.rate,
        "jitter": config.jitter,
        "span": f"{span.first}:{span.last}",
    }
    command = [sys.executable, "-m", "node.cli", "node", "--events", "--exit-with-parent"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    # Its own session: Ctrl-C reaches only us, and we end the children.
    return await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


async def _wait_ready(process: trio.Process, index: int, addresses: list[str], progress: Progress) -> None:
    assert process.stdout is not None
    buffer = b""
    while True:
        chunk = await process.stdout.receive_some()
        if not chunk:
            code = await process.wait()
            raise ModelError(f"stage {index} ended with exit code {code} before it was ready: see its message above")
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            match parse(line):
                case Loading(what=what):
                    progress.step(f"stage {index}: {what}", 0, 0)
                case Ready(address=address):
                    progress.step(f"stage {index}: ready", 1, 1)
                    addresses[index] = address
                    return
                case Failed(text=text):
                    raise ModelError(f"stage {index}: {text}")


async def _stop(processes: Sequence[trio.Process]) -> None:
    with trio.CancelScope(shield=True):
        for process in processes:
            process.terminate()
        with trio.move_on_after(_STOP_TIMEOUT_S):
            for process in processes:
                await process.wait()
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        await pipe.aclose()
