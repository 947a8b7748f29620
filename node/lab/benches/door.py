"""Implements `dsd bench door`: what a member of a swarm joined by invites gets, beside `dsd up` on the same links.

Everything runs as users start it: `dsd create`, `dsd invite`, `dsd join`, then requests to the gateway of the first
member. `dsd up` answers the same prompts in turns. Then everything restarts, and the first answers are compared with
the third ones.
"""

from statistics import median

import msgspec

from dsd_p2p.models.progress import Progress
from node.lab.benches.invited import PROMPTS, InvitedSwarm, open_invited, print_results
from node.lab.benches.programs import Answer, ask
from node.lab.config import DoorConfig
from node.lab.receipt import sample


async def run_door(config: DoorConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Measure the door, the restart and the far drafter.

    Raises:
        ModelError: a command did not start or a gateway did not answer.
    """
    async with open_invited(config, 0, progress) as swarm:
        results = await _beside_up(swarm, config, rounds, progress)
        if config.restarts:
            results["restart"] = await _restarts(swarm, config, progress)
    print_results(results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, **results}


async def _beside_up(swarm: InvitedSwarm, config: DoorConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Ask the door and `dsd up` in turns, once each beforehand for two answers that warm up and learn."""
    door = await swarm.start()
    up = await swarm.programs.start(
        *("up", "--model", config.model, "--dtype", config.dtype, "--stages", str(config.members), "--port", "0"),
        *("--link", config.link, "--mqtt", "none", "--threads", "1"),
        until="/v1",
    )
    asked: dict[str, list[Answer]] = {"door": [], "up": []}
    for prompt in PROMPTS[:2]:
        for program in (door, up):
            progress.step("warm up", 0, 0)
            await ask(program.url, config.model, prompt, config.max_tokens)
    for number in range(rounds * len(PROMPTS)):
        progress.step("ask the door and dsd up", number, rounds * len(PROMPTS))
        # The third answer of each comes first; then the prompts take turns.
        prompt = PROMPTS[(2 + number) % len(PROMPTS)]
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


async def _plain(swarm: InvitedSwarm, config: DoorConfig) -> float:
    """Return the tokens/s of an answer that is decoded plainly by a client beside the first member."""
    output = await swarm.programs.run(
        *("generate", "--swarm", f"{swarm.programs.folder}/member0/", "--mode", "plain", "--coordinator", "self"),
        *("--prompt", PROMPTS[0], "--max-tokens", str(config.max_tokens), "--link", config.link, "--json"),
    )
    stats = msgspec.json.decode(output.encode().splitlines()[-1])["stats"]
    return float(stats["num_tokens"]) / float(stats["total_s"])


async def _restarts(swarm: InvitedSwarm, config: DoorConfig, progress: Progress) -> dict[str, object]:
    """Restart everything some times, and compare the first answers with the third ones, over the same prompts."""
    first: list[float] = []
    third: list[float] = []
    for number in range(config.restarts):
        progress.step("restart", number, config.restarts)
        door = await swarm.start()
        answers = [
            await ask(door.url, config.model, PROMPTS[(number + index) % len(PROMPTS)], config.max_tokens)
            for index in range(3)
        ]
        first.append(answers[0].tokens_per_s)
        third.append(answers[2].tokens_per_s)
        await swarm.programs.stop()
    return {"first": sample(first), "third": sample(third), "first_over_third": sum(first) / sum(third)}
