"""Measures placement on real peers: four on loopback, one of them slow.

The baseline is a split in proportion to memory.
"""

import statistics
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy
from node.lab.testnet.swarm import Layout, open_testnet
from node.member.client import SwarmClient, open_swarm_client

_SLOW_PEER, _SLOWDOWN = 1, 6.0
_BEATS = 4
_MEMORY = 15
_SHARES = (8, 7, 8, 7)
"""Each peer has room for half of the model, so in a proportional split each of the four serves a quarter."""


async def measure_placement(
    folder: Path, model: str, prompt: list[int], expected: list[int], rounds: int
) -> dict[str, Any]:
    """Return plain decoding's tokens a second in both swarms, measured in turns on the same machine."""
    speeds: dict[str, list[float]] = {"chosen": [], "proportional": []}
    outcome: dict[str, Any] = {"slow_peer": _SLOW_PEER, "slowdown": _SLOWDOWN, "wrong": 0}
    async with AsyncExitStack() as stack:
        clients = {}
        rooms: dict[str, int | tuple[int, ...]] = {"chosen": _MEMORY, "proportional": _SHARES}
        for number, (name, max_layers) in enumerate(rooms.items()):
            layout = Layout(
                num_nodes=4,
                num_clients=1,
                max_layers=max_layers,
                model=model,
                slowdowns={_SLOW_PEER: _SLOWDOWN},
                is_loopback=True,
                base_port=42100 + 50 * number,
            )
            clients[name] = await _swarm(stack, layout, folder / name, outcome, name)
        for _ in range(rounds):
            for name, client in clients.items():
                tokens, seconds = await _write(client, prompt, len(expected))
                outcome["wrong"] += tokens != expected
                speeds[name].append(len(tokens) / seconds)
        for name, client in clients.items():
            plan = client.directory.plan()
            outcome[f"{name}_chain"] = [str(stage.span) for stage in plan.stages] if plan else []
    ratios = [a / b for a, b in zip(speeds["chosen"], speeds["proportional"], strict=True)]
    return outcome | {
        "tokens_per_s": speeds,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


async def _swarm(
    stack: AsyncExitStack, layout: Layout, folder: Path, outcome: dict[str, Any], name: str
) -> SwarmClient:
    net = await stack.enter_async_context(open_testnet(layout, folder))
    for node in net.nodes:
        await net.start_node(node.index)
        await net.all_ready([node])
    outcome[f"{name}_held"] = [str(node.span) for node in net.nodes]
    source = find_model(layout.model, NoProgress())
    client = await stack.enter_async_context(
        open_swarm_client(
            net.clients[0].state,
            source,
            NgramDrafter(),
            heartbeat_s=layout.heartbeat_s,
            listen="/ip4/127.0.0.1/tcp/0",
        )
    )
    await trio.sleep(_BEATS * layout.heartbeat_s)
    return client


async def _write(client: SwarmClient, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Return the tokens of one plain answer and the seconds it took."""
    start_s = trio.current_time()
    options = GenerateOptions(text=TextRequest(max_tokens=num_tokens))
    async with client.engine.generate(prompt, options, StaticPolicy(PLAIN)) as generation:
        tokens = [token async for token in generation]
    return tokens, trio.current_time() - start_s
