"""Implements `dsd bench placement`: how long planning takes in a large swarm, and how good it is in small ones."""

import random
import time
from collections.abc import Callable
from dataclasses import replace

from dsd_p2p.models.progress import Progress
from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.span import choose_move, choose_span
from dsd_p2p.placement.view import PeerView, Speculation, SwarmView
from dsd_p2p.types import PeerId, Span
from node.lab.config import PlacementConfig
from node.lab.exhaustive import best_cost_s
from node.lab.receipt import print_table, sample

_CLIENT = "client"
_SMALL_LAYERS = 8


def run_placement(config: PlacementConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time the planning of a route, of a newcomer's span and of a move, and compare routes with the best there are.

    Making the view's matrix of links is timed apart. A member makes a view for each plan, so both times add up there.
    """
    times: dict[str, list[float]] = {"route": [], "span": [], "move": [], "view": []}
    for seed in range(rounds):
        progress.step("plan in the large swarm", seed, rounds)
        swarm = random_swarm(config.seed + seed, config.peers, config.layers)
        newcomer = replace(swarm.peers[0], peer=PeerId("new"), span=None)
        client = PeerId(_CLIENT)
        times["view"].append(_ms(getattr, swarm, "link_matrix"))
        choose_route(swarm, client)
        times["route"].append(_ms(choose_route, swarm, client))
        times["span"].append(_ms(choose_span, swarm, newcomer))
        times["move"].append(_ms(choose_move, _with_gap(swarm)))
    gaps = [gap for seed in range(config.small) if (gap := _gap(config.seed + seed)) is not None]
    samples = {name: sample(values) for name, values in times.items()}
    worst = max(gaps, default=0.0)
    print_table(
        ("planning", "median, ms", "range"),
        [(name, f"{each.median:.1f}", f"{each.low:.1f} to {each.high:.1f}") for name, each in samples.items()],
    )
    return {
        "peers": config.peers,
        "layers": config.layers,
        "seed": config.seed,
        **{f"{name}_ms": each.median for name, each in samples.items()},
        "exhaustive_gap": worst,
        "small_swarms": len(gaps),
        "samples": samples,
    }


def random_swarm(seed: int, num_peers: int, num_layers: int, *, is_small: bool = False) -> SwarmView:
    """Return peers at random places, up to ten times apart in speed, whose spans overlap."""
    rng = random.Random(seed)  # noqa: S311 - a made-up swarm
    peers = []
    for index in range(num_peers):
        least, most = (2, num_layers) if is_small else (max(1, num_layers // 8), max(2, num_layers // 3))
        room = rng.randint(least, most)
        # The first peers cover the model from its first layer to its last.
        first = (
            min(index * room, num_layers - room)
            if index * room < num_layers + room
            else rng.randint(0, num_layers - room)
        )
        layer_s = 0.0005 * 10 ** rng.random()
        peers.append(
            PeerView(
                peer=PeerId(f"p{index}"),
                span=Span(first, first + room),
                max_layers=room,
                layer_s=layer_s,
                layer16_s=layer_s * rng.uniform(1, 2),
            )
        )
    names = [*(peer.peer for peer in peers), _CLIENT, "new"]
    places = {name: complex(rng.random(), rng.random()) for name in names}
    links = {(a, b): 0.002 + 0.08 * abs(places[a] - places[b]) for a in names for b in names if a != b}
    return SwarmView(num_layers=num_layers, peers=tuple(peers), one_way_s=links)


def _gap(seed: int) -> float | None:
    """Return by how much the route of a small swarm misses the best one; None if there is no route."""
    rng = random.Random(seed)  # noqa: S311 - a made-up swarm
    swarm = random_swarm(seed, rng.randint(4, 12), _SMALL_LAYERS, is_small=True)
    speculation = Speculation(coverage=rng.choice((0.5, 0.7, 0.9)))
    plan = choose_route(swarm, PeerId(_CLIENT), speculation)
    best_s = best_cost_s(swarm, _CLIENT, speculation)
    if plan is None:
        return None if best_s == float("inf") else float("inf")
    return max(0.0, plan.s_per_token / best_s - 1)


def _with_gap(swarm: SwarmView) -> SwarmView:
    return replace(
        swarm, peers=tuple(peer for peer in swarm.peers if peer.span and not peer.span.first <= 1 < peer.span.last)
    )


def _ms(action: Callable[..., object], *arguments: object) -> float:
    start_s = time.perf_counter()
    action(*arguments)
    return 1000 * (time.perf_counter() - start_s)
