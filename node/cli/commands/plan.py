"""Implements `dsd plan`: show which route and coordinator a request would use now, and why."""

import itertools
from collections.abc import Mapping

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p.coordination.draft_places import Offer
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.errors import CoverageLost
from dsd_p2p.models.source import find_model
from dsd_p2p.placement.coordinator import choose_coordinator, speculation_of
from dsd_p2p.placement.route import choose_route
from dsd_p2p.placement.view import WIDE_WINDOW_NODES, Plan, Speculation, SwarmView
from dsd_p2p.types import PeerId, short_peer
from dsd_p2p.window.base import Decision
from dsd_p2p.window.tracker import Tracker
from node.config import SwarmQuestion
from node.console import ConsoleProgress
from node.member.client import open_swarm_client
from node.member.node import coordinating_policy
from node.member.state import SwarmState

_OWN_DRAFTER = "ngram"
_BEATS = 3
"""Heartbeats to wait for before choosing: the first ones do not know the round trips yet."""


def run(config: SwarmQuestion) -> int:
    """Print the plan and return the exit code."""
    return trio.run(_plan, SwarmState(config.swarm), config.json)


async def _plan(state: SwarmState, is_json: bool) -> int:
    with ConsoleProgress() as progress:
        source = find_model(state.membership().model, progress)
    async with open_swarm_client(state, source, LOOKUP) as client:
        await trio.sleep(_BEATS * client.membership.registry.interval_s)
        await client.directory.find()
        view, me = client.directory.view(), PeerId(client.membership.links.me.peer)
        capable = client.directory.coordinators() | {me: speculation_of(_OWN_DRAFTER)}
        offers = client.directory.draft_offers()
    chosen = choose_coordinator(view, me, capable)
    own = choose_route(view, me, speculation_of(_OWN_DRAFTER))
    if chosen is None or own is None:
        raise CoverageLost("the route was lost while planning: try again")
    coordinator, plan = chosen
    window = _first_window(view, coordinator, plan, capable[coordinator])
    if is_json:
        shown = {
            "coordinator": coordinator,
            "plan": plan,
            "own": own,
            "window": window.kind,
            "drafters": _offers_of(offers),
        }
        print(msgspec.json.encode(shown).decode())
        return 0
    _show(view, coordinator, plan, me, own)
    print(f"first window: {window.kind}")
    _show_drafters(offers, coordinator, capable[coordinator], plan)
    return 0


def _show(view: SwarmView, coordinator: PeerId, plan: Plan, me: PeerId, own: Plan) -> None:
    table = Table(box=None)
    for column in ("stage", "layers", "holds", "link in", "pass of 8", "sessions"):
        table.add_column(column)
    peers = {peer.peer: peer for peer in view.peers}
    before = coordinator
    for stage in plan.stages:
        peer = peers[stage.peer]
        link_s = view.link_s(before, stage.peer) or 0.0
        pass_s = peer.layer_pass_s(8) * stage.span.num_layers
        row = (
            short_peer(stage.peer),
            str(stage.span),
            str(peer.span),
            f"{link_s * 1e3:.1f} ms",
            f"{pass_s * 1e3:.1f} ms",
        )
        table.add_row(*row, str(peer.num_sessions))
        before = stage.peer
    Console().print(table)
    where = "this machine" if coordinator == me else short_peer(coordinator)
    back_s = view.link_s(before, coordinator) or 0.0
    print(f"coordinator: {where}; link back {back_s * 1e3:.1f} ms")
    print(
        f"one traversal {plan.traversal_s * 1e3:.1f} ms, slowest stage {plan.slowest_s * 1e3:.1f} ms: "
        f"{1 / plan.s_per_token:.1f} tokens/s predicted with speculation, {1 / plan.traversal_s:.1f} without"
    )
    if coordinator != me:
        print(f"with this machine as coordinator: {1 / own.s_per_token:.1f} tokens/s")


def _first_window(view: SwarmView, coordinator: PeerId, plan: Plan, speculation: Speculation) -> Decision:
    """Return what a request on this route would send first."""
    peers = {peer.peer: peer for peer in view.peers}
    stops = [coordinator, *(stage.peer for stage in plan.stages), coordinator]
    tracker = Tracker()
    tracker.expect(
        [
            (peer.layer_pass_s(1) * stage.span.num_layers, peer.layer_pass_s(WIDE_WINDOW_NODES) * stage.span.num_layers)
            for stage in plan.stages
            if (peer := peers.get(stage.peer)) is not None
        ],
        sum(view.link_s(a, b) or 0.0 for a, b in itertools.pairwise(stops)),
        speculation.draft_s,
    )
    return coordinating_policy().decide(tracker.observe())


def _offers_of(offers: Mapping[PeerId, Offer]) -> dict[str, dict[str, object]]:
    return {peer: {"drafter": offer.drafter, "step_s": offer.step_s} for peer, offer in offers.items()}


def _show_drafters(offers: Mapping[PeerId, Offer], coordinator: PeerId, speculation: Speculation, plan: Plan) -> None:
    """Say who drafts with what, and what would make the route faster."""
    offer = offers.get(coordinator)
    print(f"drafter: {offer.drafter if offer else _OWN_DRAFTER}, {speculation.draft_s * 1e3:.0f} ms a step")
    others = [
        f"{short_peer(peer)} {each.drafter}" for peer, each in offers.items() if each.step_s and peer != coordinator
    ]
    if others:
        print(f"other members that draft: {', '.join(sorted(others))}")
    if all(each.drafter == LOOKUP.name for each in offers.values()):
        print("faster with a drafting model: dsd draft auto on the owner's machine")
    elif speculation.draft_s > plan.slowest_s:
        print("drafting is the slowest part: a member nearby that joins with --role draft may help")
    else:
        print("the slowest stage sets the pace: a member that joins there makes it faster")
