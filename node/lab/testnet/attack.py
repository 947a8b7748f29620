"""Attacks a peer of a swarm in every way we know, while an honest client writes over it.

The same attacks run in turns against a peer of the client's route and against a decoy on the same machine, because the
attackers' own work slows everything down. They run at the lowest priority, in a process of their own.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from dsd_p2p.models.source import ModelSource
from node.lab.testnet.attacks.__main__ import ALL, Result
from node.lab.testnet.attacks.ground import Ground
from node.lab.testnet.honest import BETWEEN, HonestClient, report_of, resident_mib
from node.lab.testnet.swarm import Testnet
from node.member.control import PeerReport

API_KEY = "an-ordinary-key-of-the-attackers"
_ROUNDS = 4
"""The attacks are dealt out over so many rounds, so that both targets are attacked in turns."""

_SETTLE_S = 40.0


@dataclass(slots=True)
class Suite:
    """A run of all attacks. source: the model that both swarms serve. expected: the right answer to each prompt.

    every: carry out only every Nth attack.
    """

    net: Testnet
    decoy: Testnet
    source: ModelSource
    expected: list[list[int]]
    every: int = 1
    results: list[Result] = field(default_factory=list)
    decoy_results: list[Result] = field(default_factory=list)

    async def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Run all attacks and return the outcome."""
        net, honest = self.net, HonestClient(self.net, self.expected)
        await honest.start(prompts, [self.decoy])
        before = await report_of(net)
        memory = [resident_mib(before.pid)]
        for number in range(_ROUNDS):
            for phase, target, results in (
                ("decoy", self.decoy, self.decoy_results),
                ("attacked", net, self.results),
            ):
                await honest.enter(phase)
                await self._attack(await self._ground(target), number, results)
            memory.append(resident_mib(before.pid))
        honest.phase = BETWEEN
        after, medians = await self._settled(), honest.tokens_per_s
        return {
            "not_held": [f"{each.name}: {each.why}" for each in self.results if not each.held],
            "not_held_by_the_decoy": [f"{each.name}: {each.why}" for each in self.decoy_results if not each.held],
            "seconds": {each.name: each.seconds for each in self.results},
            "is_alive": after.pid == before.pid,
            "sessions_left": after.num_sessions,
            "cache_bytes_left": after.cache_bytes,
            "resident_mib": memory,
            "honest_answers": honest.counts,
            "honest_failed": honest.failed,
            "tokens_per_s": medians,
            "attacks": len(self.results),
            "held": sum(each.held for each in self.results),
            "honest_wrong": honest.wrong,
            "honest_ratio": round(medians["attacked"] / medians["decoy"], 3),
        }

    async def _ground(self, target: Testnet) -> Ground:
        report = await report_of(target)
        stages = []
        for index in range(len(target.nodes)):
            span = target.nodes[index].span
            assert span is not None, "all peers serve layers"
            peer = target.processes[index].state.node_key().peer
            stages.append((str(peer), target.address_of(index), span))
        return Ground(
            address=target.address_of(0),
            owner=f"{target.processes[0].state.folder}/",
            api=f"http://127.0.0.1:{target.layout.gateway.port}",
            api_key=API_KEY,
            model=self.source.key(report.dtype),
            max_positions=8192,
            stages=stages,
        )

    async def _attack(self, ground: Ground, number: int, results: list[Result]) -> None:
        numbers = (str(number * self.every), str(_ROUNDS * self.every))
        process = await trio.run_process(
            [*("nice", "-n", "19", sys.executable, "-m", "node.lab.testnet.attacks"), *numbers],
            stdin=msgspec.json.encode(ground),
            capture_stdout=True,
        )
        reports = [msgspec.json.decode(line, type=Result) for line in process.stdout.splitlines()]
        assert len(reports) == len(ALL[int(numbers[0]) :: int(numbers[1])]), "every attack reports"
        results += reports

    async def _settled(self) -> PeerReport:
        """Wait until nothing of the attackers is left, or for a while; return the target's report."""
        deadline_s = trio.current_time() + _SETTLE_S
        while True:
            report = await report_of(self.net)
            # The honest client may hold one.
            if report.num_sessions <= 1 or trio.current_time() > deadline_s:
                return report
            await trio.sleep(1)
