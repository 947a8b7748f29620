"""Implements `dsd bench door`: what a member of a swarm joined by invites gets, beside `dsd up` on the same links.

Everything runs as users start it: `dsd create`, `dsd invite`, `dsd join`, then requests to the gateway of the first
member. `dsd up` answers the same prompts in turns. Then everything restarts, and the first answers are compared with
the third ones. Last, a gateway on a slowed core drafts at home and then with a member that drafts for it.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import trio

from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from node.lab.benches.programs import Answer, Program, Programs, ask, free_ports, open_programs, slowed
from node.lab.config import DoorConfig
from node.lab.receipt import Sample, print_table, sample

_PROMPTS = (
    "Write a short story about a lighthouse keeper and the sea.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a linked list.",
)
_SERVES = "/p2p/"
_SETTLE_S = 8.0
_SLOWED, _NEAR = 6.0, "5ms"


async def run_door(config: DoorConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Measure the door, the restart and the far drafter.

    Raises:
        ModelError: a command did not start or a gateway did not answer.
    """
    num_layers = read_shape(find_model(config.model, progress).folder).num_layers
    with tempfile.TemporaryDirectory(prefix="dsd-door-") as folder:
        async with open_programs(Path(folder)) as programs:
            swarm = _Swarm(programs, config, num_layers, free_ports(config.members + 2))
            results = await _beside_up(swarm, config, rounds, progress)
            if config.restarts:
                results["restart"] = await _restarts(swarm, config, progress)
            if config.far:
                results["far"] = await _far(swarm, config, rounds, progress)
    _show(results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, **results}


class _Swarm:
    """A swarm of members that were invited one by one."""

    def __init__(self, programs: Programs, config: DoorConfig, num_layers: int, ports: Sequence[int]) -> None:
        self.programs = programs
        self._config, self._ports = config, ports
        self._max_layers = -(-num_layers // config.members)
        self._is_made = False

    async def start(self) -> Program:
        """Start all members and return the first one, whose gateway is open."""
        first = ("create", "--model", self._config.model, "--dtype", self._config.dtype, "--draft", self._config.draft)
        door = await self.member(0, *(("node",) if self._is_made else first), "--port", "0", until="/v1")
        for index in range(1, self._config.members):
            await self.member(index, *(("node",) if self._is_made else ("join", await self.invite())))
        self._is_made = True
        # Links are measured with the first heartbeats.
        await trio.sleep(_SETTLE_S)
        return door

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


async def _beside_up(swarm: _Swarm, config: DoorConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Ask the door and `dsd up` in turns, once each beforehand for two answers that warm up and learn."""
    door = await swarm.start()
    up = await swarm.programs.start(
        *("up", "--model", config.model, "--dtype", config.dtype, "--stages", str(config.members), "--port", "0"),
        *("--link", config.link, "--mqtt", "none", "--threads", "1"),
        until="/v1",
    )
    asked: dict[str, list[Answer]] = {"door": [], "up": []}
    for prompt in _PROMPTS[:2]:
        for program in (door, up):
            progress.step("warm up", 0, 0)
            await ask(program.url, config.model, prompt, config.max_tokens)
    for number in range(rounds * len(_PROMPTS)):
        progress.step("ask the door and dsd up", number, rounds * len(_PROMPTS))
        # The third answer of each comes first; then the prompts take turns.
        prompt = _PROMPTS[(2 + number) % len(_PROMPTS)]
        for name, program in (("door", door), ("up", up)) if number % 2 else (("up", up), ("door", door)):
            asked[name].append(await ask(program.url, config.model, prompt, config.max_tokens))
    await up.stop()
    plain = [await _plain(swarm, config) for _ in range(rounds)]
    await swarm.programs.stop()
    return {
        "third_tokens_per_s": asked["door"][0].tokens_per_s,
        **{f"{name}_tokens_per_s": sample([each.tokens_per_s for each in answers]) for name, answers in asked.items()},
        "plain_tokens_per_s": sample(plain),
        "over_up": sample([a.tokens_per_s / b.tokens_per_s for a, b in zip(asked["door"], asked["up"], strict=True)]),
        "over_plain": median(each.tokens_per_s for each in asked["door"]) / median(plain),
        "identical": [each.text for each in asked["door"]] == [each.text for each in asked["up"]],
        "drafters": sorted({str(each.speculation["drafter"]) for answers in asked.values() for each in answers}),
    }


async def _plain(swarm: _Swarm, config: DoorConfig) -> float:
    """Return the tokens/s of an answer that is decoded plainly by a client beside the first member."""
    output = await swarm.programs.run(
        *("generate", "--swarm", f"{swarm.programs.folder}/member0/", "--mode", "plain", "--coordinator", "self"),
        *("--prompt", _PROMPTS[0], "--max-tokens", "24", "--link", config.link, "--json"),
    )
    return float(msgspec.json.decode(output.encode().splitlines()[-1])["stats"]["tokens_per_s"])


async def _restarts(swarm: _Swarm, config: DoorConfig, progress: Progress) -> dict[str, object]:
    """Restart everything some times, and compare the first answers with the third ones, over the same prompts."""
    first: list[float] = []
    third: list[float] = []
    for number in range(config.restarts):
        progress.step("restart", number, config.restarts)
        door = await swarm.start()
        answers = [
            await ask(door.url, config.model, _PROMPTS[(number + index) % len(_PROMPTS)], config.max_tokens)
            for index in range(3)
        ]
        first.append(answers[0].tokens_per_s)
        third.append(answers[2].tokens_per_s)
        await swarm.programs.stop()
    return {"first": sample(first), "third": sample(third), "first_over_third": sum(first) / sum(third)}


async def _far(swarm: _Swarm, config: DoorConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Slow a member's core that serves no layers and opens a door; let a near member draft for it, or not."""
    door, drafter = config.members, config.members + 1
    await swarm.start()
    slow = await swarm.member(
        door, "join", await swarm.invite(), "--role", "draft", "--port", "0", link=_NEAR, until="/v1"
    )
    speeds: dict[str, list[Answer]] = {"home": [], "far": []}
    invite = await swarm.invite()
    for number in range(rounds):
        for arm in speeds:
            progress.step(f"slowed, drafts from {arm}", number, rounds)
            if arm == "far":
                helper = await swarm.member(
                    drafter, *(("node",) if number else ("join", invite)), "--role", "draft", link=_NEAR
                )
            await trio.sleep(2 * _SETTLE_S)
            async with slowed(slow, _SLOWED):
                speeds[arm] += [await ask(slow.url, config.model, prompt, config.max_tokens) for prompt in _PROMPTS]
            if arm == "far":
                await helper.stop()
    await swarm.programs.stop()
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(speeds["far"], speeds["home"], strict=True)]
    return {
        **{f"{arm}_tokens_per_s": sample([each.tokens_per_s for each in answers]) for arm, answers in speeds.items()},
        "far_over_home": sample(ratios),
        "identical": [each.text for each in speeds["far"]] == [each.text for each in speeds["home"]],
        "far_drafters": sorted({str(each.speculation["drafter"]) for each in speeds["far"]}),
    }


def _show(results: dict[str, object]) -> None:
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
