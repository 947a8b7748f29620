"""Disturbs a swarm while clients write: peers are killed, frozen, cut off, or leave, and links lose packets.

Every finished answer must equal the unsplit model's. Nothing may hang. A request may only fail with a typed error, and
only when layers were really lost. Nothing may stay allocated at the end.
"""

import random
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from dsd_p2p.errors import DsdError
from node.lab.testnet.events import Answered, Event
from node.lab.testnet.swarm import Testnet
from node.member.control import PeerReport, Status, ask_node

_DEADLINE_S = 120.0
_COVERAGE_S = 60.0
"""A failure is blamed on lost layers if they were lost within this many seconds before its request began, or later."""

_MAX_DISTURBED = 3
_DRAIN_S = 150.0
_LEAK_S = 40.0
_LOSS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a run.

    prompts: token ids. expected: the unsplit model's answer to each.
    """

    minutes: float
    seed: int
    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The result of a run.

    failed_while_covered: the failures that happened although every layer was served, with their texts.
    """

    answers: int = 0
    wrong: int = 0
    hung: int = 0
    failed_typed: int = 0
    failed_while_covered: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    pauses_s: list[float] = field(default_factory=list)
    num_resumes: int = 0
    num_tokens: int = 0
    events: Counter[str] = field(default_factory=Counter)
    leaked: int = 0
    leaks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for scripts, with pauses in seconds."""
        pauses = sorted(self.pauses_s)
        return {
            "answers": self.answers,
            "wrong": self.wrong,
            "hung": self.hung,
            "leaked": self.leaked,
            "failed_typed": self.failed_typed,
            "failed_while_covered": self.failed_while_covered,
            "failures": dict(self.failures),
            "pauses": {
                "count": len(pauses),
                "median_s": statistics.median(pauses) if pauses else 0.0,
                "p90_s": pauses[int(0.9 * len(pauses))] if pauses else 0.0,
                "max_s": pauses[-1] if pauses else 0.0,
                "resumed": self.num_resumes,
            },
            "tokens": self.num_tokens,
            "events": dict(self.events),
            "leaks": self.leaks,
        }


class Chaos:
    """A run that disturbs peers and judges answers."""

    def __init__(self, testnet: Testnet, plan: Plan) -> None:
        self._net = testnet
        self._plan = plan
        self._rng = random.Random(plan.seed)  # noqa: S311 - what breaks when
        self._disturbed: set[int] = set()
        self._uncovered_at_s = -1e9
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        """Start everything, disturb it for the planned time, let it heal, and count."""
        net = self._net
        net.on_event = self._note
        for node in net.nodes:
            await net.start_node(node.index)
        await net.all_ready(net.nodes)
        for client in net.clients:
            seed = self._plan.seed * 1000 + client.index
            num_tokens = len(self._plan.expected[0])
            await net.launch(net.client_command(client.index, self._plan.prompts, num_tokens, seed, _DEADLINE_S))
        await net.all_ready(net.clients)
        _say(f"{len(net.nodes)} peers and {len(net.clients)} clients are up")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_coverage)
            async with trio.open_nursery() as disturbances:
                with trio.move_on_after(self._plan.minutes * 60):
                    await self._break_forever(disturbances)
            _say("the disturbances are over; waiting for the last answers")
            await self._finish()
            nursery.cancel_scope.cancel()
        await self._count_leaks()
        return self.outcome

    # Disturbances

    async def _break_forever(self, nursery: trio.Nursery) -> None:
        kinds: list[Callable[[int], Awaitable[None]]] = [
            self._kill,
            self._freeze,
            self._cut_off,
            self._lose_packets,
            self._one_way,
            self._leave,
        ]
        while True:
            await trio.sleep(self._rng.uniform(4, 8))
            healthy = [
                node.index
                for node in self._net.nodes
                if node.index not in self._disturbed and (node.span or self._net.layout.role(node.index) == "draft")
            ]
            if len(self._disturbed) >= _MAX_DISTURBED or not healthy:
                continue
            index, kind = self._rng.choice(healthy), self._rng.choice(kinds)
            name = kind.__name__.strip("_")
            self.outcome.events[name] += 1
            _say(f"peer {index}: {name}")
            self._disturbed.add(index)
            nursery.start_soon(self._disturb, kind, index)

    async def _disturb(self, kind: Callable[[int], Awaitable[None]], index: int) -> None:
        # Finish a disturbance, with its repair, even when the time is over.
        with trio.CancelScope(shield=True):
            await kind(index)
        self._disturbed.discard(index)

    async def _kill(self, index: int) -> None:
        self._net.signal(index, signal.SIGKILL)
        await self._restart(index)

    async def _leave(self, index: int) -> None:
        self._net.signal(index, signal.SIGTERM)
        with trio.move_on_after(20):
            while self._net.is_alive(index):  # noqa: ASYNC110 - not our child
                await trio.sleep(0.2)
        self._net.signal(index, signal.SIGKILL)
        await self._restart(index)

    async def _restart(self, index: int) -> None:
        await trio.sleep(self._rng.uniform(2, 8))
        await self._net.start_node(index)
        with trio.move_on_after(60):
            await self._net.processes[index].is_ready.wait()

    async def _freeze(self, index: int) -> None:
        self._net.signal(index, signal.SIGSTOP)
        await trio.sleep(self._rng.uniform(3, 8))
        self._net.signal(index, signal.SIGCONT)
        await trio.sleep(3)

    async def _cut_off(self, index: int) -> None:
        await self._change_links(index, self._rng.uniform(3, 10), is_up=False)

    async def _lose_packets(self, index: int) -> None:
        await self._change_links(index, 10, loss=_LOSS)

    async def _change_links(self, index: int, seconds: float, *, loss: float = 0.0, is_up: bool = True) -> None:
        others = [process.index for process in self._net.processes if process.index != index]
        for other in others:
            self._net.set_link(index, other, loss=loss, is_up=is_up)
            self._net.set_link(other, index, loss=loss, is_up=is_up)
        await trio.sleep(seconds)
        for other in others:
            self._net.set_link(index, other)
            self._net.set_link(other, index)
        await trio.sleep(3)

    async def _one_way(self, index: int) -> None:
        other = self._rng.choice([process.index for process in self._net.processes if process.index != index])
        self._net.set_link(index, other, is_up=False)
        await trio.sleep(self._rng.uniform(3, 8))
        self._net.set_link(index, other)
        await trio.sleep(3)

    # Results

    async def _watch_coverage(self) -> None:
        """Note when some layer has no undisturbed holder; peers with lossy links count as disturbed."""
        while True:
            held: set[int] = set()
            for node in self._net.nodes:
                if node.span is not None and node.index not in self._disturbed:
                    held |= set(range(node.span.first, node.span.last))
            if len(held) < 30:
                self._uncovered_at_s = trio.current_time()
            await trio.sleep(0.1)

    def _note(self, index: int, event: Event) -> None:
        if not isinstance(event, Answered):
            return
        outcome, expected = self.outcome, list(self._plan.expected[event.prompt])
        outcome.answers += 1
        outcome.num_tokens += len(event.tokens)
        outcome.pauses_s += event.pauses_s
        outcome.num_resumes += event.resumes
        is_whole = not event.error and not event.is_hung
        if event.tokens != (expected if is_whole else expected[: len(event.tokens)]):
            outcome.wrong += 1
            _say(f"WRONG client {index} prompt {event.prompt}: {event.tokens} instead of {expected}")
        outcome.hung += event.is_hung
        if event.error:
            outcome.failed_typed += 1
            outcome.failures[event.error] += 1
            was_uncovered = trio.current_time() - self._uncovered_at_s < _COVERAGE_S + event.seconds
            if not was_uncovered:
                outcome.failed_while_covered.append(f"{event.error}: {event.text}")
            _say(
                f"client {index} failed: {event.error}: {event.text} (layers were {'lost' * was_uncovered or 'covered'})"
            )

    async def _finish(self) -> None:
        for client in self._net.clients:
            self._net.signal(client.index, signal.SIGTERM)
        with trio.move_on_after(_DRAIN_S):
            while any(self._net.is_alive(client.index) for client in self._net.clients):  # noqa: ASYNC110 - not our child
                await trio.sleep(0.5)
        for client in self._net.clients:
            if self._net.is_alive(client.index):
                self.outcome.hung += 1
                self._net.signal(client.index, signal.SIGKILL)

    async def _count_leaks(self) -> None:
        """Count the peers that still hold sessions or cache bytes after orphaned sessions had time to end."""
        with trio.move_on_after(_LEAK_S):
            while True:
                leaks = await self._held()
                if not leaks:
                    break
                await trio.sleep(1)
        self.outcome.leaks = leaks
        self.outcome.leaked = len(leaks)

    async def _held(self) -> list[str]:
        held = []
        for node in self._net.nodes:
            try:
                status = await ask_node(node.state.control_socket, Status(), timeout_s=5)
            except DsdError as exc:
                held.append(f"peer {node.index} does not answer: {exc}")
                continue
            assert isinstance(status, PeerReport)
            if status.num_sessions or status.cache_bytes:
                held.append(f"peer {node.index}: {status.num_sessions} sessions, {status.cache_bytes} bytes")
        return held


def _say(text: str) -> None:
    print(f"{trio.current_time() % 10000:7.1f} {text}", file=sys.stderr, flush=True)
