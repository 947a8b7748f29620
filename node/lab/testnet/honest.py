"""The honest client of a swarm under attack: its answers, judged and counted by the phase in which they came."""

import statistics
from collections import defaultdict
from pathlib import Path

import trio

from node.lab.testnet.events import Answered, Event
from node.lab.testnet.swarm import Testnet
from node.member.control import PeerReport, Status, ask_node

BETWEEN = "between"


class HonestClient:
    """The first client of `net`. expected: the right answer to each prompt. phase: the present one."""

    def __init__(self, net: Testnet, expected: list[list[int]]) -> None:
        self._net = net
        self._expected = expected
        self._speeds: dict[str, list[float]] = defaultdict(list)
        self.phase = BETWEEN
        self.wrong = 0
        self.failed: list[str] = []

    async def start(self, prompts: list[list[int]], others: list[Testnet]) -> None:
        """Start all peers of its swarm and of the others, then the client; return after two answers."""
        net = self._net
        net.on_event = self._note
        for each in (net, *others):
            for node in each.nodes:
                await each.start_node(node.index)
            await each.all_ready(each.nodes)
        client = net.clients[0]
        await net.launch(net.client_command(client.index, prompts, len(self._expected[0]), 1, 120))
        await net.all_ready([client])
        await self.answers(2)

    async def enter(self, phase: str) -> None:
        """Begin a phase. An answer that was under way counts for none."""
        self.phase = BETWEEN
        await self.answers(1)
        self.phase = phase

    async def answers(self, count: int) -> None:
        """Wait for so many answers of this phase."""
        speeds = self._speeds[self.phase]
        goal = len(speeds) + count
        with trio.fail_after(300):
            while len(speeds) < goal:  # noqa: ASYNC110 - reports come from another process
                await trio.sleep(0.2)

    @property
    def counts(self) -> dict[str, int]:
        """The number of answers in each phase."""
        return {phase: len(speeds) for phase, speeds in self._speeds.items()}

    @property
    def tokens_per_s(self) -> dict[str, float]:
        """The median speed in each phase."""
        return {phase: statistics.median(speeds) for phase, speeds in self._speeds.items() if speeds}

    def _note(self, _index: int, event: Event) -> None:
        if not isinstance(event, Answered):
            return
        expected = self._expected[event.prompt]
        is_whole = not event.error and not event.is_hung
        self.wrong += event.tokens != (expected if is_whole else expected[: len(event.tokens)])
        if is_whole:
            self._speeds[self.phase].append(len(event.tokens) / event.seconds)
        else:
            self.failed.append(f"{self.phase}: {event.error or 'hung'}: {event.text}")


async def report_of(net: Testnet) -> PeerReport:
    """Return the report of the first peer."""
    report = await ask_node(net.nodes[0].state.control_socket, Status(), timeout_s=30)
    assert isinstance(report, PeerReport)
    return report


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 1)
