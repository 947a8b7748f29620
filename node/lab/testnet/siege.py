"""Attacks a peer with hostile handshakes and malformed frames while an honest client keeps writing.

The same attack runs in turns against a peer of the client's route and against an unrelated decoy. On one machine the
attackers slow everything down, so only the difference between the two is the attack's effect on the peer. The attackers
run at the lowest priority.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.lab.testnet.events import Answered, Event
from node.lab.testnet.swarm import Testnet
from node.member.control import PeerReport, Status, ask_node

ATTACKERS = 4


@dataclass(slots=True)
class Siege:
    """A run that attacks the first peer of a testnet.

    The last `ATTACKERS` clients of each testnet are invited but never started. decoy: a testnet whose first peer is
    attacked for comparison.
    """

    net: Testnet
    decoy: Testnet
    frames: int
    handshakes: int
    rounds: int
    expected: list[list[int]]
    speeds: dict[str, list[float]] = field(
        default_factory=lambda: {"calm": [], "decoy": [], "besieged": [], "between": []}
    )
    wrong: int = 0
    phase: str = "between"
    sent_frames: int = 0
    sent_handshakes: int = 0

    async def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Run the attack and return its outcome."""
        net = self.net
        net.on_event = self._note
        for each in (net, self.decoy):
            for node in each.nodes:
                await each.start_node(node.index)
            await each.all_ready(each.nodes)
        client = net.clients[0]
        await net.launch(net.client_command(client.index, prompts, len(self.expected[0]), 1, 120))
        await net.all_ready([client])
        await self._answers(2)
        before = await self._status()
        rss_before = _resident_mib(before.pid)
        for number in range(self.rounds):
            for phase, target in (("calm", None), ("decoy", self.decoy), ("besieged", net)):
                # Answers that were under way when the phase changed count for neither phase.
                self.phase = "between"
                await self._answers(1)
                self.phase = phase
                if target is None:
                    await self._answers(3)
                    continue
                async with trio.open_nursery() as nursery:
                    for attacker in range(ATTACKERS):
                        nursery.start_soon(self._attack, target, attacker, number)
        self.phase = "between"
        await trio.sleep(5)
        after = await self._status()
        medians = {phase: statistics.median(speeds) for phase, speeds in self.speeds.items() if speeds}
        return {
            "frames_sent": self.sent_frames,
            "frames_read": after.num_frames - before.num_frames,
            "handshakes": self.sent_handshakes,
            "peers_thrown_out": after.num_refused - before.num_refused,
            "is_alive": after.pid == before.pid,
            "resident_mib_before": rss_before,
            "resident_mib_after": _resident_mib(after.pid),
            "honest_answers": {phase: len(speeds) for phase, speeds in self.speeds.items()},
            "wrong": self.wrong,
            "tokens_per_s": medians,
            "ratio": medians["besieged"] / medians["decoy"],
        }

    def _note(self, _index: int, event: Event) -> None:
        if not isinstance(event, Answered):
            return
        self.wrong += event.tokens != self.expected[event.prompt]
        self.speeds[self.phase].append(len(event.tokens) / event.seconds)

    async def _answers(self, count: int) -> None:
        speeds = self.speeds[self.phase]
        goal = len(speeds) + count
        with trio.fail_after(300):
            while len(speeds) < goal:  # noqa: ASYNC110 - reports come from another process
                await trio.sleep(0.2)

    async def _attack(self, target: Testnet, attacker: int, number: int) -> None:
        share = ATTACKERS * self.rounds
        folder: Path = target.clients[1 + attacker].state.folder
        result = await trio.run_process(
            [
                *("nice", "-n", "19", sys.executable, "-m", "node.lab.testnet.attacker"),
                *(target.address_of(0), f"{folder}/", str(self.frames // share), str(self.handshakes // share)),
                str(100 * number + attacker),
            ],
            capture_stdout=True,
        )
        num_handshakes, num_frames = result.stdout.split()
        if target is self.net:
            self.sent_handshakes += int(num_handshakes)
            self.sent_frames += int(num_frames)

    async def _status(self) -> PeerReport:
        status = await ask_node(self.net.nodes[0].state.control_socket, Status(), timeout_s=30)
        assert isinstance(status, PeerReport)
        return status


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))
