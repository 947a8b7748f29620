"""Runs `dsd` commands as users start them, and asks the gateways that they open."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import trio

from dsd_p2p.errors import ModelError

_COMMAND = (sys.executable, "-m", "node.cli")
_URL = re.compile(r"http://[^ ,]+/v1")
_SLICE_S = 0.024
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _ANSWER_TIMEOUT_S = 300.0, 20.0, 600.0


@dataclass(slots=True, kw_only=True)
class Program:
    """A running command. url: where its gateway's API is, once it has said so."""

    process: trio.Process
    url: str = ""

    async def stop(self) -> None:
        """End the command and wait until it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        with trio.move_on_after(_STOP_TIMEOUT_S):
            await self.process.wait()
            return
        self.process.kill()
        await self.process.wait()


class Answer(msgspec.Struct):
    """A whole answer. tokens_per_s: as the client saw it, the prompt included."""

    text: str
    num_tokens: int
    tokens_per_s: float
    speculation: dict[str, object]


class Programs:
    """The commands of one benchmark; all end with its block. Their logs lie in `folder`."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.running: list[Program] = []
        self._nursery = nursery

    async def start(self, *arguments: str, until: str) -> Program:
        """Start a command and wait for a line that contains `until`.

        Raises:
            ModelError: the command ended or did not get that far; says what it printed last.
        """
        with (self.folder / "log").open("ab") as log:
            process = await trio.lowlevel.open_process(
                [*_COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        program = Program(process=process)
        self.running.append(program)
        reached = trio.Event()
        lines: list[str] = []
        self._nursery.start_soon(_read, program, until, lines, reached)
        with trio.move_on_after(_START_TIMEOUT_S):
            await reached.wait()
        if not any(until in line for line in lines):
            last = (lines or (self.folder / "log").read_text().splitlines() or ["nothing"])[-1]
            raise ModelError(f"`dsd {' '.join(arguments)}` did not start; its last line: {last}")
        return program

    async def run(self, *arguments: str) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            ModelError: it failed; says why.
        """
        with trio.move_on_after(_ANSWER_TIMEOUT_S) as scope:
            done = await trio.run_process(
                [*_COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
            )
        if scope.cancelled_caught:
            raise ModelError(f"`dsd {' '.join(arguments)}` took more than {_ANSWER_TIMEOUT_S:g} s")
        if done.returncode:
            raise ModelError(f"`dsd {' '.join(arguments)}` failed: {done.stderr.decode().strip()[-500:]}")
        return done.stdout.decode()

    async def stop(self) -> None:
        """End all commands, the last started first."""
        while self.running:
            await self.running.pop().stop()


@asynccontextmanager
async def open_programs(folder: Path) -> AsyncIterator[Programs]:
    """Open a place for commands until the end of the block."""
    async with trio.open_nursery() as nursery:
        programs = Programs(folder, nursery)
        try:
            yield programs
        finally:
            with trio.CancelScope(shield=True):
                await programs.stop()
            nursery.cancel_scope.cancel()


async def _read(program: Program, until: str, lines: list[str], reached: trio.Event) -> None:
    assert program.process.stdout is not None
    buffer = b""
    while chunk := await program.process.stdout.receive_some():
        *whole, buffer = (buffer + chunk).split(b"\n")
        for line in (each.decode(errors="replace") for each in whole):
            lines.append(line)
            if (url := _URL.search(line)) is not None:
                program.url = url[0]
            if until in line:
                reached.set()
    reached.set()


async def ask(url: str, model: str, prompt: str, max_tokens: int) -> Answer:
    """Ask a gateway one question, greedily, and wait for the whole answer.

    Raises:
        ModelError: it did not answer; says why.
    """
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    async with httpx.AsyncClient(timeout=_ANSWER_TIMEOUT_S) as client:
        start_s = time.perf_counter()
        try:
            reply = await client.post(f"{url}/chat/completions", json=body)
            reply.raise_for_status()
        except httpx.HTTPError as exc:
            raise ModelError(f"{url} did not answer: {exc!r}") from exc
        seconds = time.perf_counter() - start_s
    answer = json.loads(reply.content)
    num_tokens = int(answer["usage"]["completion_tokens"])
    return Answer(
        text=answer["choices"][0]["message"]["content"],
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / seconds,
        speculation=answer["usage"]["speculation"][0],
    )


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nothing listens on now."""
    with_ports = [socket.socket() for _ in range(count)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


@asynccontextmanager
async def slowed(program: Program, factor: float) -> AsyncIterator[None]:
    """Let a program run only for one `factor`-th of the time, as on a slower core, until the end of the block."""
    pid = program.process.pid

    async def hold() -> None:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await trio.sleep(_SLICE_S * (1 - 1 / factor))
            os.kill(pid, signal.SIGCONT)
            await trio.sleep(_SLICE_S / factor)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
