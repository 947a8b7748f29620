"""Attacks a peer of a swarm in every way we know, while an honest client writes over it.

The same attacks run in turns against a peer of the client's route and against a decoy on the same machine, because the
attackers' own work slows everything down. They run at the lowest priority, in a process of their own.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from dsd_p2p.models.source import ModelSource
from node.lab.testnet.attacks.__main__ import ALL, Result
from node.lab.testnet.attacks.ground import Ground
from node.lab.testnet.events import Answered, Event
from node.lab.testnet.swarm import Testnet
from node.member.control import PeerReport, Status, ask_node

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
    phase: str = "calm"
    speeds: dict[str, list[float]] = field(
        default_factory=lambda: {"calm": [], "decoy": [], "attacked": [], "between": []}
    )
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    decoy_results: list[Result] = field(default_factory=list)

    async def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Run all attacks and return the outcome."""
        net = self.net
        net.on_event = self._note
        for each in (net, self.decoy):
            for node in each.nodes:
                await each.start_node(node.index)
            await each.all_ready(each.nodes)
        client = net.clients[0]
        await net.launch(net.client_command(client.index, prompts, len(self.expected[0]), 1, 120))
        await net.all_ready([client])
        await self._answers(3)
        before = await _report(net)
        memory = [_resident_mib(before.pid)]
        for number in range(_ROUNDS):
            for phase, target, results in (
                ("decoy", self.decoy, self.decoy_results),
                ("attacked", net, self.results),
            ):
                # Answers that were under way when the phase changed count for neither phase.
                self.phase = "between"
                await self._answers(1)
                self.phase = phase
                await self._attack(await self._ground(target), number, results)
            memory.append(_resident_mib(before.pid))
        self.phase = "between"
        after = await self._settled()
        return self._outcome(before, after, memory)

    def _outcome(self, before: PeerReport, after: PeerReport, memory: list[float]) -> dict[str, Any]:
        medians = {phase: statistics.median(speeds) for phase, speeds in self.speeds.items() if speeds}
        return {
            "not_held": [f"{each.name}: {each.why}" for each in self.results if not each.held],
            "not_held_by_the_decoy": [f"{each.name}: {each.why}" for each in self.decoy_results if not each.held],
            "names": [each.name for each in self.results],
            "is_alive": after.pid == before.pid,
            "sessions_left": after.num_sessions,
            "cache_bytes_left": after.cache_bytes,
            "resident_mib": memory,
            "honest_answers": {phase: len(speeds) for phase, speeds in self.speeds.items()},
            "honest_failed": self.failed,
            "tokens_per_s": medians,
            "attacks": len(self.results),
            "held": sum(each.held for each in self.results),
            "honest_wrong": self.wrong,
            "honest_ratio": round(medians["attacked"] / medians["decoy"], 3),
        }

    def _note(self, _index: int, event: Event) -> None:
        if not isinstance(event, Answered):
            return
        expected = self.expected[event.prompt]
        self.wrong += event.tokens != expected[: len(event.tokens)]
        if event.error or event.is_hung:
            self.failed.append(f"{self.phase}: {event.error or 'hung'}: {event.text}")
        else:
            self.speeds[self.phase].append(len(event.tokens) / event.seconds)

    async def _answers(self, count: int) -> None:
        goal = len(self.speeds[self.phase]) + count
        with trio.fail_after(300):
            while len(self.speeds[self.phase]) < goal:  # noqa: ASYNC110 - reports come from another process
                await trio.sleep(0.2)

    async def _ground(self, target: Testnet) -> Ground:
        report = await _report(target)
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
            report = await _report(self.net)
            # The honest client may hold one.
            if report.num_sessions <= 1 or trio.current_time() > deadline_s:
                return report
            await trio.sleep(1)


async def _report(net: Testnet) -> PeerReport:
    report = await ask_node(net.nodes[0].state.control_socket, Status(), timeout_s=30)
    assert isinstance(report, PeerReport)
    return report


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 1)
