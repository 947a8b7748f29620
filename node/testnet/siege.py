"""A node under siege: hostile handshakes and bent frames by the hundred thousand, beside an honest client that writes on.

Rounds with and without the attack alternate; the node must be alive afterwards, its memory flat, its honest client unharmed.
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.control import NodeStatus, Status, ask_node
from node.testnet.events import Answered, Event
from node.testnet.swarm import Testnet

ATTACKERS = 4


@dataclass(slots=True)
class Siege:
    """Attacks the first node of a testnet whose last `ATTACKERS` clients are invited and never started."""

    net: Testnet
    frames: int
    handshakes: int
    rounds: int
    expected: list[list[int]]
    calm: list[float] = field(default_factory=list)
    besieged: list[float] = field(default_factory=list)
    wrong: int = 0
    is_besieged: bool = False
    sent_frames: int = 0
    sent_handshakes: int = 0

    async def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Return what came of it."""
        net = self.net
        net.on_event = self._note
        for node in net.nodes:
            await net.start_node(node.index)
        await net.all_ready(net.nodes)
        client = net.clients[0]
        await net.launch(net.client_command(client.index, prompts, len(self.expected[0]), 1, 120))
        await net.all_ready([client])
        await self._answers(3)
        before = await self._status()
        rss_before = _resident_mib(before.pid)
        self.calm.clear()
        for number in range(self.rounds):
            await self._answers(3)
            self.is_besieged = True
            async with trio.open_nursery() as nursery:
                for attacker in range(ATTACKERS):
                    nursery.start_soon(self._attack, attacker, number)
            self.is_besieged = False
            await self._answers(1)
            self.calm.pop()
        await trio.sleep(5)
        after = await self._status()
        calm, besieged = statistics.median(self.calm), statistics.median(self.besieged)
        return {
            "frames_sent": self.sent_frames,
            "frames_read": after.num_frames - before.num_frames,
            "handshakes": self.sent_handshakes,
            "peers_thrown_out": after.num_refused - before.num_refused,
            "is_alive": after.pid == before.pid,
            "resident_mib_before": rss_before,
            "resident_mib_after": _resident_mib(after.pid),
            "honest_answers_besieged": len(self.besieged),
            "wrong": self.wrong,
            "tokens_per_s_calm": calm,
            "tokens_per_s_besieged": besieged,
            "ratio": besieged / calm,
        }

    def _note(self, _index: int, event: Event) -> None:
        if not isinstance(event, Answered):
            return
        self.wrong += event.tokens != self.expected[event.prompt]
        (self.besieged if self.is_besieged else self.calm).append(len(event.tokens) / event.seconds)

    async def _answers(self, count: int) -> None:
        goal = len(self.calm) + count
        with trio.fail_after(300):
            while len(self.calm) < goal:  # noqa: ASYNC110 - reports come from another process
                await trio.sleep(0.2)

    async def _attack(self, attacker: int, number: int) -> None:
        share = ATTACKERS * self.rounds
        folder: Path = self.net.clients[1 + attacker].state.folder
        result = await trio.run_process(
            [
                *("nice", "-n", "10", sys.executable, "-m", "node.testnet.attacker"),
                *(self.net.address_of(0), f"{folder}/", str(self.frames // share), str(self.handshakes // share)),
                str(100 * number + attacker),
            ],
            stdout=subprocess.PIPE,
        )
        num_handshakes, num_frames = result.stdout.split()
        self.sent_handshakes += int(num_handshakes)
        self.sent_frames += int(num_frames)

    async def _status(self) -> NodeStatus:
        status = await ask_node(self.net.nodes[0].state.control_socket, Status(), timeout_s=30)
        assert isinstance(status, NodeStatus)
        return status


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))
