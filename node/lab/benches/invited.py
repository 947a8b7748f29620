"""A swarm of `dsd` commands that were invited one by one, and the prompts that it is asked."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from node.lab.benches.programs import Program, Programs, free_ports, open_programs
from node.lab.config import InvitedConfig
from node.lab.receipt import Sample, print_table

PROMPTS = (
    "Write a short story about a lighthouse keeper and the sea.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a linked list.",
)
SETTLE_S = 8.0
"""Links are measured with the first heartbeats."""

_SERVES = "/p2p/"


class InvitedSwarm:
    """A swarm of members that were invited one by one."""

    def __init__(self, programs: Programs, config: InvitedConfig, num_layers: int, ports: Sequence[int]) -> None:
        self.programs = programs
        self._config, self._ports = config, ports
        self._max_layers = -(-num_layers // config.members)
        self._is_made = False

    async def start(self, *, with_door: bool = True) -> Program:
        """Start all members and return the first one, whose gateway is open if it is to have one."""
        first = ("create", "--model", self._config.model, "--dtype", self._config.dtype, "--draft", self._config.draft)
        door = ("--port", "0") if with_door else ()
        program = await self.member(
            0, *(("node",) if self._is_made else first), *door, until="/v1" if with_door else _SERVES
        )
        for index in range(1, self._config.members):
            await self.member(index, *(("node",) if self._is_made else ("join", await self.invite())))
        self._is_made = True
        await trio.sleep(SETTLE_S)
        return program

    async def invite(self) -> str:
        """Return a new invite of the first member."""
        return (await self.programs.run("invite", "--swarm", self._folder(0))).split()[-1]

    async def member(self, index: int, *command: str, link: str = "", until: str = _SERVES) -> Program:
        """Start one member."""
        flags = (
            *("--swarm", self._folder(index), "--listen", f"/ip4/127.0.0.1/tcp/{self._ports[index]}", "--no-lan"),
            *("--threads", "1", "--max-layers", str(self._max_layers), "--link", link or self._config.link),
        )
        return await self.programs.start(*command, *flags, until=until)

    def _folder(self, index: int) -> str:
        return f"{self.programs.folder}/member{index}/"


@asynccontextmanager
async def open_invited(config: InvitedConfig, num_more: int, progress: Progress) -> AsyncIterator[InvitedSwarm]:
    """Open a swarm that is not started yet. num_more: members besides those that serve layers. Everything ends with it.

    Raises:
        ModelError: the model cannot be loaded.
    """
    num_layers = read_shape(find_model(config.model, progress).folder).num_layers
    with tempfile.TemporaryDirectory(prefix="dsd-invited-") as folder:
        async with open_programs(Path(folder)) as programs:
            yield InvitedSwarm(programs, config, num_layers, free_ports(config.members + num_more))


def print_results(results: dict[str, object]) -> None:
    """Print a benchmark's results as a table."""
    print_table(("measure", "value"), list(_rows("", results)))


def _rows(prefix: str, results: dict[str, object]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in results.items():
        if isinstance(value, dict):
            rows += _rows(f"{name}: ", value)
        elif isinstance(value, Sample):
            rows.append((prefix + name, f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"))
        else:
            rows.append((prefix + name, f"{value:.2f}" if isinstance(value, float) else str(value)))
    return rows
