"""Implements `dsd bench drafts`: a gateway on a slowed core, which drafts at home and then with a member nearby."""

import trio

from dsd_p2p.models.progress import Progress
from node.lab.benches.invited import PROMPTS, SETTLE_S, InvitedSwarm, open_invited, print_results
from node.lab.benches.programs import Answer, ask, slowed
from node.lab.config import DraftsConfig
from node.lab.receipt import sample

_SLOWED, _NEAR = 6.0, "5ms"


async def run_drafts(config: DraftsConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Measure the gateway without and with a near member that drafts.

    Raises:
        ModelError: a command did not start or a gateway did not answer.
    """
    async with open_invited(config, 2, progress) as swarm:
        results = await _compare(swarm, config, rounds, progress)
    print_results(results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, **results}


async def _compare(swarm: InvitedSwarm, config: DraftsConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Slow a member's core that serves no layers and opens a door; let a near member draft for it, or not."""
    door, drafter = config.members, config.members + 1
    await swarm.start(with_door=False)
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
            await trio.sleep(2 * SETTLE_S)
            async with slowed(slow, _SLOWED):
                speeds[arm] += [await ask(slow.url, config.model, prompt, config.max_tokens) for prompt in PROMPTS]
            if arm == "far":
                await helper.stop()
    await swarm.programs.stop()
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(speeds["far"], speeds["home"], strict=True)]
    return {
        **{f"{arm}_tokens_per_s": sample([each.tokens_per_s for each in answers]) for arm, answers in speeds.items()},
        "far_over_home": sample(ratios),
        "identical": [each.text for each in speeds["far"]] == [each.text for each in speeds["home"]],
        **{
            f"{arm}_drafters": sorted({str(each.speculation["drafter"]) for each in answers})
            for arm, answers in speeds.items()
        },
    }
