"""Attacks a peer with hostile handshakes and malformed frames while an honest client keeps writing.

The same attack runs in turns against a peer of the client's route and against an unrelated decoy. On one machine the
attackers slow everything down, so only the difference between the two is the attack's effect on the peer. The attackers
run at the lowest priority.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from node.lab.testnet.honest import BETWEEN, HonestClient, report_of, resident_mib
from node.lab.testnet.swarm import Testnet

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
    sent_frames: int = 0
    sent_handshakes: int = 0

    async def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Run the attack and return its outcome."""
        net, honest = self.net, HonestClient(self.net, self.expected)
        await honest.start(prompts, [self.decoy])
        before = await report_of(net)
        rss_before = resident_mib(before.pid)
        for number in range(self.rounds):
            for phase, target in (("calm", None), ("decoy", self.decoy), ("besieged", net)):
                await honest.enter(phase)
                if target is None:
                    await honest.answers(3)
                    continue
                async with trio.open_nursery() as nursery:
                    for attacker in range(ATTACKERS):
                        nursery.start_soon(self._attack, target, attacker, number)
        honest.phase = BETWEEN
        await trio.sleep(5)
        after, medians = await report_of(net), honest.tokens_per_s
        return {
            "frames_sent": self.sent_frames,
            "frames_read": after.num_frames - before.num_frames,
            "handshakes": self.sent_handshakes,
            "peers_thrown_out": after.num_refused - before.num_refused,
            "is_alive": after.pid == before.pid,
            "resident_mib_before": rss_before,
            "resident_mib_after": resident_mib(after.pid),
            "honest_answers": honest.counts,
            "honest_failed": honest.failed,
            "wrong": honest.wrong,
            "tokens_per_s": medians,
            "ratio": medians["besieged"] / medians["decoy"],
        }

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
