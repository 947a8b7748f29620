"""Placement on real peers: four on loopback, one of them slow, against the split by memory alone."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.pipeline.directory import NO_DETOUR, Chain
from dsd_p2p.pipeline.engine import GenerateOptions
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.placement.route import Detour
from dsd_p2p.types import PeerId, Span
from dsd_p2p.window.static import PLAIN, StaticPolicy
from dsd_p2p.wire.messages import Hop
from node.swarm_client import SwarmClient, open_swarm_client
from node.testnet.swarm import Layout, open_testnet

_SLOWDOWN = 6.0
_NUM_LAYERS = 30
_BEATS = 4


async def measure_placement(
    folder: Path, model: str, prompts: list[list[int]], expected: list[list[int]], rounds: int
) -> dict[str, Any]:
    """Return tokens a second over the chain that placement chooses, and over all four peers in proportion to their memory."""
    # Each could hold half of the model; the second is slow.
    layout = Layout(num_nodes=4, num_clients=1, max_layers=15, model=model, slowdowns={1: _SLOWDOWN}, is_loopback=True)
    speeds: dict[str, list[float]] = {"chosen": [], "proportional": []}
    wrong = 0
    async with open_testnet(layout, folder) as net:
        for node in net.nodes:
            await net.start_node(node.index)
            await net.all_ready([node])
        source = find_model(model, NoProgress())
        async with open_swarm_client(
            net.clients[0].state, source, NgramDrafter(), heartbeat_s=layout.heartbeat_s, listen="/ip4/127.0.0.1/tcp/0"
        ) as client:
            await trio.sleep(_BEATS * layout.heartbeat_s)
            chosen = await client.directory.find()
            proportional = _proportional(chosen, {n.state.node_key().peer: n.span for n in net.nodes})
            for _ in range(rounds):
                for name, chain in (("chosen", chosen), ("proportional", proportional)):
                    tokens, seconds = await _write(client, chain, prompts[0], len(expected[0]))
                    wrong += tokens != expected[0]
                    speeds[name].append(len(tokens) / seconds)
        ratios = [a / b for a, b in zip(speeds["chosen"], speeds["proportional"], strict=True)]
        return {
            "held": [str(node.span) for node in net.nodes],
            "slow_peer": 1,
            "slowdown": _SLOWDOWN,
            "chosen": [[hop.peer[-8:], str(hop.span)] for hop in chosen.hops],
            "proportional": [[hop.peer[-8:], str(hop.span)] for hop in proportional.hops],
            "tokens_per_s": speeds,
            "ratio_median": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "wrong": wrong,
        }


def _proportional(chosen: Chain, held: dict[PeerId, Span | None]) -> Chain:
    """Equal memory is equal shares: every peer runs a quarter of the layers, from what it holds."""
    heads = [peer for peer, span in held.items() if span is not None and span.first == 0]
    tails = [peer for peer, span in held.items() if span is not None and span.last == _NUM_LAYERS]
    spans = [Span(*bounds) for bounds in even_spans(_NUM_LAYERS, 4)]
    hops = [Hop(peer=peer, address="", span=span) for peer, span in zip([*heads, *tails], spans, strict=True)]
    return replace(chosen, hops=tuple(hops))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """A directory of one chain."""

    chain: Chain

    async def find(self, detour: Detour = NO_DETOUR) -> Chain:
        return self.chain

    def replicas(self, span: Span, but: str) -> list[PeerId]:
        return []


async def _write(client: SwarmClient, chain: Chain, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Return the tokens of one plain answer over a chain, and the seconds it took."""
    engine = client.engine
    directory, engine.directory = engine.directory, _Fixed(chain=chain)
    start_s = trio.current_time()
    try:
        async with engine.generate(prompt, GenerateOptions(max_tokens=num_tokens), StaticPolicy(PLAIN)) as generation:
            return [token async for token in generation], trio.current_time() - start_s
    finally:
        engine.directory = directory
