"""Who holds which layers, over which chain, and who coordinates: pure, on made-up swarms."""

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_p2p.errors import ConfigError
from dsd_p2p.placement.coordinator import choose_coordinator, speculation_of
from dsd_p2p.placement.listed import balanced_spans, even_spans
from dsd_p2p.placement.route import Detour, choose_route
from dsd_p2p.placement.span import choose_move, choose_span
from dsd_p2p.placement.view import PeerView, Plan, PlannedStage, Speculation, SwarmView, seconds_per_token
from dsd_p2p.types import PeerId, Span


def proportional_spans(view: SwarmView) -> dict[PeerId, Span]:
    """Split the layers by memory alone, in the order of the nodes: what placement is measured against."""
    total = sum(node.max_layers for node in view.peers)
    spans: dict[PeerId, Span] = {}
    first, given = 0, 0
    for node in view.peers:
        given += node.max_layers
        last = round(view.num_layers * given / total)
        if last > first:
            spans[node.peer] = Span(first, last)
        first = last
    return spans


def evaluate(
    view: SwarmView, coordinator: PeerId, stages: Sequence[PlannedStage], speculation: Speculation
) -> Plan | None:
    """Return the prediction of a given chain; None when two neighbours in it cannot talk."""
    by_peer = {node.peer: node for node in view.peers}
    loop = [coordinator, *(stage.peer for stage in stages), coordinator]
    links = [view.link_s(a, b) for a, b in itertools.pairwise(loop)]
    passes = [by_peer[stage.peer].layer_pass_s(speculation.window_nodes) * stage.span.num_layers for stage in stages]
    if any(link is None for link in links):
        return None
    traversal_s = math.fsum(link or 0.0 for link in links) + math.fsum(passes)
    slowest_s = max(passes)
    return Plan(
        stages=tuple(stages),
        traversal_s=traversal_s,
        slowest_s=slowest_s,
        s_per_token=seconds_per_token(traversal_s, slowest_s, speculation),
    )


def node(name, span=None, *, layer_s=0.001, max_layers=30, num_sessions=0):
    return PeerView(
        peer=name, span=span, max_layers=max_layers, layer_s=layer_s, layer16_s=2 * layer_s, num_sessions=num_sessions
    )


def view(*nodes, num_layers=30, link_s=0.01, links=None):
    names = [*(n.peer for n in nodes), "client"]
    one_way_s = {(a, b): link_s for a in names for b in names if a != b} | (links or {})
    return SwarmView(num_layers=num_layers, peers=nodes, one_way_s=one_way_s)


def random_swarm(seed):
    """Five to nine peers, ten times apart in speed, up to 110 ms apart, with 1.3 to 2.5 times the memory the model needs."""
    rng = random.Random(seed)
    num_layers, num_nodes = rng.choice([24, 28, 32]), rng.randint(5, 9)
    weights = [rng.choice([1, 2, 3, 4]) for _ in range(num_nodes)]
    total = rng.uniform(1.3, 2.5) * num_layers
    nodes = []
    for index, weight in enumerate(weights):
        layer_s = 0.0005 * 10 ** rng.uniform(0, 1)
        room = max(2, min(num_layers, -(-int(total * weight) // sum(weights))))
        nodes.append(
            PeerView(peer=f"p{index}", max_layers=room, layer_s=layer_s, layer16_s=layer_s * rng.uniform(1, 2))
        )
    names = [*(n.peer for n in nodes), "client"]
    places = {name: complex(rng.random(), rng.random()) for name in names}
    links = {(a, b): 0.002 + 0.08 * abs(places[a] - places[b]) for a in names for b in names if a != b}
    return SwarmView(num_layers=num_layers, peers=tuple(nodes), one_way_s=links)


def joined(swarm):
    """The swarm after its peers have joined one by one."""
    placed = replace(swarm, peers=())
    for each in swarm.peers:
        placed = replace(placed, peers=(*placed.peers, replace(each, span=choose_span(placed, each))))
    return placed


def test_placement_beats_the_split_by_memory():
    ratios = []
    for seed in range(20):
        swarm = random_swarm(seed)
        stages = [PlannedStage(peer=peer, span=span) for peer, span in proportional_spans(swarm).items()]
        proportional = evaluate(swarm, "client", stages, Speculation())
        chosen = choose_route(joined(swarm), "client")
        ratios.append(proportional.s_per_token / chosen.s_per_token)
    assert statistics.median(ratios) >= 1.2
    assert min(ratios) >= 1


def test_a_chain_covers_every_layer_once_and_is_what_it_predicts():
    for seed in range(6):
        swarm = joined(random_swarm(seed))
        plan = choose_route(swarm, "client")
        layers = [layer for stage in plan.stages for layer in range(stage.span.first, stage.span.last)]
        assert layers == list(range(swarm.num_layers))
        held = {n.peer: n.span for n in swarm.peers}
        assert all(held[stage.peer].holds(stage.span) for stage in plan.stages)
        assert evaluate(swarm, "client", plan.stages, Speculation()).s_per_token == pytest.approx(plan.s_per_token)


def test_no_chain_over_the_same_peers_is_faster():
    """Against every chain of a small swarm, one by one."""
    nodes = [node("a", Span(0, 3)), node("b", Span(1, 4), layer_s=0.003), node("c", Span(2, 4), layer_s=0.0005)]
    swarm = view(*nodes, num_layers=4, links={("a", "c"): 0.05, ("c", "client"): 0.002})
    best = choose_route(swarm, "client")

    def chains(at, used):
        if at == 4:
            yield ()
        for each in nodes:
            if each.peer not in used and each.span.first <= at < each.span.last:
                for end in range(at + 1, each.span.last + 1):
                    for rest in chains(end, {*used, each.peer}):
                        yield (PlannedStage(peer=each.peer, span=Span(at, end)), *rest)

    every = [evaluate(swarm, "client", chain, Speculation()) for chain in chains(0, set())]
    assert len(every) > 5
    assert best.s_per_token == pytest.approx(min(plan.s_per_token for plan in every))


def test_distance_speed_load_and_detours_count():
    near, far = node("near", Span(0, 30)), node("far", Span(0, 30))
    links = {("client", "far"): 0.2, ("far", "client"): 0.2}
    assert choose_route(view(near, far, links=links), "client").stages[0].peer == "near"
    slow = node("near", Span(0, 30), layer_s=0.05)
    assert choose_route(view(slow, far, links=links), "client").stages[0].peer == "far"
    busy = node("near", Span(0, 30), num_sessions=20)
    shares = {
        stage.peer: stage.span.num_layers for stage in choose_route(view(busy, far, links=links), "client").stages
    }
    assert shares["far"] > 25
    avoid = Detour(peers=frozenset(["near"]))
    assert choose_route(view(near, far, links=links), "client", None, avoid).stages[0].peer == "far"
    cut = Detour(links=frozenset([("near", "client")]))
    assert choose_route(view(near, far, links=links), "client", None, cut).stages[0].peer == "far"
    kept = Detour(kept=frozenset([PlannedStage(peer="far", span=Span(0, 30))]))
    assert choose_route(view(near, far, links=links), "client", None, kept).stages[0].peer == "far"
    assert choose_route(view(near, far, link_s=0.01), "nobody") is None


def test_joining_closes_gaps_before_it_makes_copies():
    assert choose_span(view(), node("a", max_layers=12)) == Span(0, 12)
    swarm = view(node("a", Span(0, 12)))
    assert choose_span(swarm, node("b", max_layers=12)) == Span(12, 24)
    swarm = view(node("a", Span(0, 12)), node("b", Span(12, 24)))
    assert choose_span(swarm, node("c", max_layers=12)).last == 30
    whole = view(node("a", Span(0, 15)), node("b", Span(15, 30), layer_s=0.02), node("c", max_layers=15))
    assert choose_span(whole, node("c", max_layers=15)) == Span(15, 30), "in place of the slow one"


def test_a_gap_is_closed_by_who_loads_least_and_keeps_what_it_has():
    swarm = view(
        node("a", Span(0, 10), max_layers=20),
        node("b", Span(20, 30), max_layers=12),
        node("c", Span(0, 10), max_layers=10),
    )
    move = choose_move(swarm)
    assert (move.peer, move.span) == ("a", Span(0, 20)), "ten layers more, none given up"
    mended = replace(swarm, peers=tuple(replace(n, span=move.span) if n.peer == move.peer else n for n in swarm.peers))
    assert mended.uncovered() == []
    assert choose_move(mended) is None, "nothing moves without a gap"
    swarm = view(node("a", Span(0, 15), max_layers=15), node("b", Span(0, 15), max_layers=15))
    assert choose_move(swarm).span == Span(15, 30), "a copy is worth less than a gap"
    lonely = view(node("a", Span(0, 15), max_layers=15))
    assert choose_move(lonely) is None, "moving the gap closes nothing"


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=5))
def test_moves_end_and_never_open_a_gap(spans):
    nodes = [
        node(f"n{i}", Span(first, min(10, first + length)), max_layers=max(length, room))
        for i, (first, length, room) in enumerate(spans)
    ]
    swarm = view(*nodes, num_layers=10)
    for _ in range(12):
        move = choose_move(swarm)
        if move is None:
            break
        before = len(swarm.uncovered())
        swarm = replace(
            swarm, peers=tuple(replace(n, span=move.span) if n.peer == move.peer else n for n in swarm.peers)
        )
        assert len(swarm.uncovered()) < before
    else:
        pytest.fail("moves went on and on")


def test_the_coordinator_is_where_the_loop_is_shortest():
    stage = node("stage", Span(0, 30))
    links = {("client", "stage"): 0.1, ("stage", "client"): 0.1}
    swarm = view(stage, links=links)
    model, lookup = speculation_of("shadow+ngram"), speculation_of("ngram")
    assert choose_coordinator(swarm, "client", {"client": lookup, "stage": lookup})[0] == "stage"
    assert choose_coordinator(swarm, "client", {"client": lookup, "stage": lookup}, avoid=["stage"])[0] == "client"
    links = {("client", "stage"): 0.02, ("stage", "client"): 0.02}
    closer = view(stage, links=links)
    assert choose_coordinator(closer, "client", {"client": lookup, "stage": lookup})[0] == "stage"
    assert choose_coordinator(closer, "client", {"client": model, "stage": lookup})[0] == "client"
    near = view(stage, link_s=0.0005)
    assert choose_coordinator(near, "client", {"client": lookup, "stage": lookup})[0] == "client", (
        "not worth a dependency"
    )
    assert choose_coordinator(view(), "client", {"client": lookup}) is None


@given(st.integers(1, 100), st.integers(1, 12), st.floats(0, 20))
def test_the_stage_with_the_head_gets_fewer_layers(num_layers, num_stages, head_layers):
    if num_stages > num_layers:
        with pytest.raises(ConfigError, match="one per layer at most"):
            balanced_spans(num_layers, num_stages, head_layers)
        return

    def largest(spans):
        return max(last - first + (head_layers if last == num_layers else 0) for first, last in spans)

    spans = balanced_spans(num_layers, num_stages, head_layers)
    assert len(spans) == num_stages
    assert [bound for span in spans for bound in range(*span)] == list(range(num_layers))
    assert all(first < last for first, last in spans)
    assert largest(spans) <= largest(even_spans(num_layers, num_stages))
