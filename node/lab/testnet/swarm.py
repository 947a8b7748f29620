"""Runs a testnet: its namespaces and links, its peer and client processes, and their reports."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import trio

from dsd_p2p.errors import ModelError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.swarm.invite import InviteTerms, SwarmSettings, new_invite
from dsd_p2p.types import Span
from dsd_p2p.wire.membership import Role
from node.config import NO_GATEWAY, GatewayConfig, ServeFlags
from node.lab.testnet.events import Command, Event, StartClient, StartNode, parse
from node.local.events import Failed, Ready, Started
from node.local.netlab import LinkChange, Netlab, address, namespace, netlab
from node.member.state import SwarmState

_PORT, _LOOPBACK_PORT = 4001, 42100
_BANDWIDTH_BPS = 200e6
_NEAR_S, _FAR_S = 0.002, 0.040
_START_TIMEOUT_S = 240.0
_INVITE_S = 86400


@dataclass(slots=True, kw_only=True)
class Process:
    """One serving peer or client.

    span: the layers that a peer serves, None before it serves any. failure: why the process did not start, empty if it
    did.
    """

    index: int
    state: SwarmState
    pid: int = 0
    is_running: bool = False
    is_ready: trio.Event = field(default_factory=trio.Event)
    span: Span | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The size and settings of a testnet.

    max_layers: for all serving peers, or one number for each. slowdowns: factors of the slowed peers, by index. record:
    the folder for each process's telemetry. draft: the drafter of the clients. num_drafters: how many of the nodes, the
    last ones, serve no layers and only draft. is_loopback: run everything on 127.0.0.1 from `base_port` on, without
    namespaces. This needs no root and has no links to change. gateway: the API of the first peer.
    """

    num_nodes: int
    num_clients: int
    max_layers: int | tuple[int, ...]
    model: str
    heartbeat_s: float = 1.0
    seed: int = 0
    slowdowns: dict[int, float] = field(default_factory=dict)
    is_loopback: bool = False
    base_port: int = _LOOPBACK_PORT
    record: str = ""
    draft: str = "ngram"
    num_drafters: int = 0
    gateway: GatewayConfig = NO_GATEWAY

    def role(self, index: int) -> Literal["stage", "draft"]:
        """Return what a node does."""
        return "stage" if index < self.num_nodes - self.num_drafters else "draft"

    def recording(self, index: int) -> str:
        """Return the file for a process's telemetry, empty for none."""
        return f"{self.record}/{index}.jsonl" if self.record else ""

    def ip(self, index: int) -> str:
        """Return the IP address of a process."""
        return "127.0.0.1" if self.is_loopback else address(index + 1)

    def port(self, index: int) -> int:
        """Return the port that a process listens on."""
        return self.base_port + index if self.is_loopback else _PORT

    def namespace(self, index: int) -> str:
        """Return the network namespace of a process, empty for ours."""
        return "" if self.is_loopback else namespace(index + 1)


class Testnet:
    """A running testnet. Processes are numbered from 0, the serving peers first; their hosts are numbered from 1."""

    def __init__(self, layout: Layout, lab: Netlab | None, launcher: trio.Process, folder: Path) -> None:
        self.layout = layout
        self.lab = lab
        self._launcher = launcher
        num_all = layout.num_nodes + layout.num_clients
        self.processes = [Process(index=index, state=SwarmState(str(folder / f"{index}"))) for index in range(num_all)]
        self.on_event: Callable[[int, Event], None] = lambda _index, _event: None
        rng = random.Random(layout.seed)  # noqa: S311 - where the hosts lie
        self._places = [(rng.random(), rng.random()) for _ in range(num_all)]
        self._invite()
        for a in range(num_all):
            for b in range(num_all):
                if a != b:
                    self.set_link(a, b)

    @property
    def nodes(self) -> list[Process]:
        """The processes that serve layers."""
        return self.processes[: self.layout.num_nodes]

    @property
    def clients(self) -> list[Process]:
        """The client processes."""
        return self.processes[self.layout.num_nodes :]

    def address_of(self, index: int) -> str:
        """Return the multiaddr of a serving peer."""
        peer = self.processes[index].state.node_key().peer
        return f"/ip4/{self.layout.ip(index)}/tcp/{self.layout.port(index)}/p2p/{peer}"

    def latency_s(self, a: int, b: int) -> float:
        """Return the one-way latency between the hosts of two processes."""
        return _NEAR_S + _FAR_S * math.dist(self._places[a], self._places[b])

    def set_link(self, a: int, b: int, *, loss: float = 0.0, is_up: bool = True) -> None:
        """Change the link from one process to another, in that direction only."""
        if self.lab is None:
            return
        self.lab.change(
            LinkChange(
                a=a + 1,
                b=b + 1,
                latency_s=self.latency_s(a, b),
                bandwidth_bps=_BANDWIDTH_BPS,
                loss=loss,
                is_up=is_up,
            )
        )

    async def start_node(self, index: int) -> None:
        """Start a peer's node daemon. It becomes ready later."""
        layout = self.layout
        config = ServeFlags(
            swarm=str(self.processes[index].state.folder) + "/",
            listen=f"/ip4/{layout.ip(index)}/tcp/{layout.port(index)}",
            max_layers=layout.max_layers if isinstance(layout.max_layers, int) else layout.max_layers[index],
            heartbeat=f"{layout.heartbeat_s}s",
            lan=False,
            draft=layout.draft,
            role=layout.role(index),
            record=layout.recording(index),
        )
        slowdown = layout.slowdowns.get(index, 1.0)
        gateway = NO_GATEWAY if index else layout.gateway
        await self.launch(
            StartNode(index=index, config=config, namespace=layout.namespace(index), slowdown=slowdown, gateway=gateway)
        )

    async def launch(self, command: Command) -> None:
        """Start a process."""
        process = self.processes[command.index]
        process.is_ready, process.span, process.failure = trio.Event(), None, ""
        process.is_running = True
        assert self._launcher.stdin is not None
        await self._launcher.stdin.send_all(msgspec.json.encode(command) + b"\n")

    def signal(self, index: int, number: signal.Signals) -> None:
        """Send a signal to a process of the testnet."""
        process = self.processes[index]
        if process.pid:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            process.span = None

    def is_alive(self, index: int) -> bool:
        """Return whether the process exists."""
        return self.processes[index].pid > 0 and Path(f"/proc/{self.processes[index].pid}").exists()

    def client_command(
        self, index: int, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, deadline_s: float
    ) -> StartClient:
        """Return the command that starts a client."""
        port = 0 if self.layout.is_loopback else _PORT + 1
        return StartClient(
            index=index,
            swarm=f"{self.processes[index].state.folder}/",
            namespace=self.layout.namespace(index),
            prompts=[list(prompt) for prompt in prompts],
            max_tokens=max_tokens,
            seed=seed,
            deadline_s=deadline_s,
            heartbeat_s=self.layout.heartbeat_s,
            listen=f"/ip4/{self.layout.ip(index)}/tcp/{port}",
            record=self.layout.recording(index),
            draft=self.layout.draft,
        )

    async def all_ready(self, processes: list[Process]) -> None:
        """Wait until the processes are ready.

        Raises:
            ModelError: a process failed or did not start in time.
        """
        with trio.move_on_after(_START_TIMEOUT_S) as scope:
            for process in processes:
                await process.is_ready.wait()
                if process.failure:
                    raise ModelError(f"process {process.index} did not start: {process.failure}")
        if scope.cancelled_caught:
            waiting = [process.index for process in processes if not process.is_ready.is_set()]
            raise ModelError(f"processes {waiting} did not start within {_START_TIMEOUT_S:g} s")

    async def listen(self) -> None:
        """Process the reports of all processes until the last one has ended."""
        assert self._launcher.stdout is not None
        buffer = b""
        while chunk := await self._launcher.stdout.receive_some():
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                report = parse(line)
                self._note(self.processes[report.index], report.event)
                self.on_event(report.index, report.event)

    def _note(self, process: Process, event: Event) -> None:
        match event:
            case Started(pid=pid):
                process.pid = pid
            case Ready(span=span):
                process.span = _parse_span(span)
                process.is_ready.set()
            case Failed(text=text):
                process.failure = text
                process.is_ready.set()
            case _:
                pass

    def _invite(self) -> None:
        """Create the swarm with the first peer as owner and invite the others."""
        first = self.processes[0].state
        stored = first.create(model=self.layout.model, dtype="float32", digest="")
        bootstrap = (self.address_of(0),)
        for process in self.processes[1:]:
            role = Role.STAGE if process.index < self.layout.num_nodes else Role.CLIENT
            invite = new_invite(
                first.owner_key(),
                os.urandom(32),
                InviteTerms(role=role, expires_at_s=int(time.time()) + _INVITE_S, max_uses=1),
                SwarmSettings(
                    network_key=stored.network_key,
                    bootstrap=bootstrap,
                    model=stored.model,
                    dtype=stored.dtype,
                    digest=stored.digest,
                ),
            )
            process.state.join(invite)


def _parse_span(text: str) -> Span | None:
    bounds = text.strip("[)").split(",")
    return Span(int(bounds[0]), int(bounds[1])) if len(bounds) == 2 else None


@asynccontextmanager
async def open_testnet(layout: Layout, folder: Path) -> AsyncIterator[Testnet]:
    """Open the namespaces, links and launcher until the end of the block. Every started process ends with it.

    Raises:
        ConfigError: the user is not root, or the kernel or iproute2 refuses.
    """
    with ExitStack() as stack:
        num_hosts = layout.num_nodes + layout.num_clients + 1
        lab = None if layout.is_loopback else stack.enter_context(netlab(num_hosts, LinkModel()))
        launcher = await trio.lowlevel.open_process(
            [sys.executable, "-m", "node.lab.testnet.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with trio.open_nursery() as nursery:
                testnet = Testnet(layout, lab, launcher, folder)
                nursery.start_soon(testnet.listen)
                yield testnet
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True), suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
                await launcher.wait()
