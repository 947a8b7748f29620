"""Runs a swarm of stage processes on this machine until the end of a block."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import msgspec
import trio

from dsd_p2p.errors import ModelError
from dsd_p2p.models.progress import Progress
from dsd_p2p.types import Span
from node.config import ModelFlags, NodeConfig
from node.local.events import Failed, Loading, Ready, Started, parse
from node.local.stage_processes import StageProcess

_STILL_TIMEOUT_S = 180.0
"""Stages that start tell what they do; the time runs only while they tell nothing."""

_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStage:
    """One stage process of the swarm."""

    address: str
    pid: int
    weight_bytes: int


@asynccontextmanager
async def local_swarm(stages: Sequence[StageProcess], progress: Progress) -> AsyncIterator[list[LocalStage]]:
    """Start one process per stage of a real model. See `stage_swarm`."""
    async with stage_swarm("node.local.stage_processes", stages, progress) as started:
        yield started


@asynccontextmanager
async def stage_swarm(
    program: str, stages: Sequence[msgspec.Struct], progress: Progress
) -> AsyncIterator[list[LocalStage]]:
    """Run the module `program`, which forks one process per stage, and yield the stages in order once all are serving.

    If a process dies later, its peers notice when they talk to it. All processes end with the block, and also when this
    process is killed: each watches its standard input, a pipe whose other end we hold.

    Raises:
        ModelError: a stage could not start; the text says why.
    """
    # They get a session of their own: Ctrl-C reaches only us, and we end them.
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        await process.stdin.send_all(msgspec.json.encode(list(stages)) + b"\n")
        with trio.move_on_after(_STILL_TIMEOUT_S) as scope:
            started = await _all_ready(process, len(stages), progress, scope)
        if scope.cancelled_caught:
            raise ModelError(f"the stages told nothing for {_STILL_TIMEOUT_S:g} s: is the machine out of memory?")
        yield started
    finally:
        await _stop(process)


def stage_processes(config: ModelFlags, spans: Sequence[Span]) -> list[StageProcess]:
    """Return the process to start for each span of the model."""
    shared = {name: getattr(config, name) for name in ModelFlags.__struct_fields__}
    return [StageProcess(config=NodeConfig(span=f"{span.first}:{span.last}", **shared)) for span in spans]


async def _all_ready(
    process: trio.Process, num_stages: int, progress: Progress, scope: trio.CancelScope
) -> list[LocalStage]:
    assert process.stdout is not None
    pids: dict[int, int] = {}
    ready: dict[int, LocalStage] = {}
    buffer = b""
    while len(ready) < num_stages:
        chunk = await process.stdout.receive_some()
        if not chunk:
            raise ModelError("the stage processes ended before they were ready: see their messages above")
        scope.deadline = trio.current_time() + _STILL_TIMEOUT_S
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            report = parse(line)
            match report.event:
                case Loading(what=what):
                    progress.step(f"stage {report.index}: {what}", 0, 0)
                case Started(pid=pid):
                    pids[report.index] = pid
                case Ready(address=address, weight_bytes=weight_bytes):
                    progress.step(f"stage {report.index}: ready", 1, 1)
                    ready[report.index] = LocalStage(address=address, pid=pids[report.index], weight_bytes=weight_bytes)
                case Failed(text=text):
                    raise ModelError(f"stage {report.index}: {text}")
    return [ready[index] for index in range(num_stages)]


async def _stop(process: trio.Process) -> None:
    """Ask the whole process session to stop, then kill it."""
    with trio.CancelScope(shield=True):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with trio.move_on_after(_STOP_TIMEOUT_S):
                await _session_gone(process)
                break
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    await pipe.aclose()


async def _session_gone(process: trio.Process) -> None:
    """Wait for all processes: the pipe ends when the last process that can write to it has ended."""
    assert process.stdout is not None
    while await process.stdout.receive_some():
        pass
    await process.wait()
