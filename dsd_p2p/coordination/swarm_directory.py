"""Finds routes among the members of a swarm."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import trio

from dsd_p2p.coordination.directory import NO_DETOUR, OURSELVES, Replica
from dsd_p2p.coordination.draft_places import Offer
from dsd_p2p.errors import CoverageLost
from dsd_p2p.peers.membership import Membership
from dsd_p2p.placement.coordinator import USUAL_TRAVERSAL_S, speculation_of
from dsd_p2p.placement.route import Detour, choose_route
from dsd_p2p.placement.view import PeerView, Plan, Speculation, SwarmView, seconds_per_token
from dsd_p2p.session.request import Route
from dsd_p2p.swarm.registry import Member
from dsd_p2p.types import ModelKey, PeerId, Span, short_peer
from dsd_p2p.wire.membership import MemberState
from dsd_p2p.wire.messages import Hop

_BELIEVED_BEATS = 2
"""Heartbeats for which a reported broken link is avoided; after that, the heartbeats themselves show its state."""

_MIN_PLANNING_INTERVAL_S = 0.1
"""Planning ahead rests this long after each plan, so that a swarm in which much happens costs no core."""


class SwarmDirectory:
    """A directory of a swarm's members, which finds the fastest route by their heartbeats and measurements.

    model, num_layers, max_positions: the model that the route must serve. coverage_timeout_s: how long to wait for a gap to close.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        model: ModelKey,
        num_layers: int,
        max_positions: int = 0,
        speculation: Speculation | None = None,
        coverage_timeout_s: float = 30.0,
    ) -> None:
        self._membership = membership
        self._model = model
        self._num_layers = num_layers
        self._max_positions = max_positions
        self._speculation = speculation or Speculation()
        self._coverage_timeout_s = coverage_timeout_s
        self._ahead: Plan | None = None

    async def find(self, detour: Detour = NO_DETOUR) -> Route:
        """Return the fastest route; wait for one while there is none.

        Raises:
            CoverageLost: no route was found in time; says why and names the uncovered layers, if any.
        """
        if detour == NO_DETOUR and self._ahead is not None and self._holds(self._ahead):
            return self._route(self._ahead)
        interval_s = self._membership.registry.interval_s
        believed_until_s = trio.current_time() + _BELIEVED_BEATS * interval_s
        with trio.move_on_after(self._coverage_timeout_s):
            while (plan := self.plan(detour)) is None:
                # Link measurements change even when no member joins or leaves, so look again after each interval.
                with trio.move_on_after(interval_s):
                    await self._membership.changed()
                if trio.current_time() > believed_until_s:
                    detour = replace(detour, links=frozenset())
            return self._route(plan)
        raise CoverageLost(self._explain(detour))

    async def plan_ahead(self) -> None:
        """Plan again whenever the swarm changes, so that a request finds its route ready."""
        while True:
            self._ahead = self.plan()
            # Loads and links change with every heartbeat.
            with trio.move_on_after(self._membership.registry.interval_s):
                await self._membership.changed()
            await trio.sleep(_MIN_PLANNING_INTERVAL_S)

    def plan(self, detour: Detour = NO_DETOUR) -> Plan | None:
        """Return the fastest route at this moment, or None."""
        return choose_route(self.view(), PeerId(self._membership.links.me.peer), self._speculation, detour)

    def view(self, *, with_joining: bool = False) -> SwarmView:
        """Return a view of the living members that can hold layers. with_joining: include those still loading."""
        states = {MemberState.SERVING, MemberState.JOINING} if with_joining else {MemberState.SERVING}
        members = [member for member in self._membership.registry.members() if member.is_alive]
        told = [m for m in members if m.record.state in states and m.record.profile.max_layers]
        layer_s = believed_s([member.record.profile.layer_us / 1e6 for member in told])
        layer16_s = believed_s([member.record.profile.layer16_us / 1e6 for member in told])
        peers = tuple(
            PeerView(
                peer=member.peer,
                span=member.record.info.span if self._serves_our_model(member) else None,
                max_layers=member.record.profile.max_layers,
                layer_s=one_s,
                layer16_s=wide_s,
                num_sessions=member.num_sessions,
            )
            for member, one_s, wide_s in zip(told, layer_s, layer16_s, strict=True)
        )
        links = {
            (str(member.peer), peer): round_trip_s / 2
            for member in members
            for peer, round_trip_s in member.neighbours_s.items()
        }
        return SwarmView(num_layers=self._num_layers, peers=peers, one_way_s=links)

    def root_of(self, peer: str) -> str:
        """Return the key that the owner let in: a machine of the owner's own, or the invite that a peer came with."""
        record = self._membership.registry.record_of(PeerId(peer))
        if peer == self._membership.links.me.peer:
            return OURSELVES
        return record.grants[0].subject.hex() if record is not None and record.grants else peer

    def replicas(self, span: Span, but: str) -> list[Replica]:
        """Return the members that serve a span, except the peer `but`: ourselves first, then the least busy."""
        peers = [
            peer for peer in self.view().peers if peer.peer != but and peer.span is not None and peer.span.holds(span)
        ]
        me = self._membership.links.me.peer
        ordered = sorted(peers, key=lambda peer: (peer.peer != me, peer.num_sessions))
        return [Replica(peer.peer, self.root_of(peer.peer)) for peer in ordered]

    def coordinators(self) -> dict[PeerId, Speculation]:
        """Return the members that coordinate for thin clients, each with the speculation of its best drafter.

        That may be another member's, if the link between them is short enough.
        """
        drafting = self._drafting()
        return {
            member.peer: _best_speculation(member, drafting) for member in drafting if member.record.profile.max_layers
        }

    def draft_offers(self) -> dict[PeerId, Offer]:
        """Return what other members offer to draft with, as seen from here."""
        return {
            member.peer: Offer(
                drafter=member.record.profile.drafter,
                step_s=member.record.profile.draft_us / 1e6,
                round_trip_s=member.round_trip_s,
            )
            for member in self._drafting()
            if member.round_trip_s is not None and member.peer != self._membership.registry.me
        }

    def hint_givers(self) -> list[PeerId]:
        """Return the members that coordinate and draft, the nearest first."""
        offers = self.draft_offers()
        return sorted(offers, key=lambda peer: (offers[peer].round_trip_s, peer))

    def _drafting(self) -> list[Member]:
        """Return the living members that have a drafter."""
        return [
            member
            for member in self._membership.registry.members()
            if member.is_alive and member.record.profile.drafter and member.record.state is MemberState.SERVING
        ]

    def _holds(self, plan: Plan) -> bool:
        """Return whether all members of a plan still live and serve their layers."""
        registry = self._membership.registry
        records = [registry.record_of(stage.peer) for stage in plan.stages]
        return all(
            record is not None
            and record.state is MemberState.SERVING
            and (record.info.model, record.info.num_layers) == (self._model, self._num_layers)
            and record.info.span is not None
            and record.info.span.holds(stage.span)
            and registry.is_alive(stage.peer)
            for record, stage in zip(records, plan.stages, strict=True)
        )

    def _serves_our_model(self, member: Member) -> bool:
        info = member.record.info
        # The context is the model's. A member that claims a shorter one would shorten every answer.
        is_whole = not self._max_positions or info.max_positions == self._max_positions
        return (info.model, info.num_layers) == (self._model, self._num_layers) and is_whole

    def _route(self, plan: Plan) -> Route:
        records = [self._membership.registry.record_of(stage.peer) for stage in plan.stages]
        infos = [record.info for record in records if record is not None]
        return Route(
            hops=tuple(
                Hop(peer=stage.peer, address=info.addresses[0] if info.addresses else "", span=stage.span)
                for stage, info in zip(plan.stages, infos, strict=True)
            ),
            model=self._model,
            max_positions=min(info.max_positions for info in infos),
        )

    def _explain(self, detour: Detour) -> str:
        view = self.view()
        uncovered = view.uncovered()
        waited = f"within {self._coverage_timeout_s:g} s"
        if len(uncovered) == self._num_layers:
            return f"no peer that serves this model was reached {waited}: see `dsd members` and `dsd doctor`"
        if uncovered:
            return (
                f"no peer serves layers {_ranges(uncovered)}, and the gap did not close {waited}: "
                "see `dsd members`, or add a peer with `dsd join`"
            )
        if detour.peers:
            return f"every route leads through a peer that failed this request ({_names(detour.peers)}): add replicas"
        return f"all layers are held, but their peers could not reach one another {waited}: see `dsd doctor`"


def believed_s(told: Sequence[float]) -> list[float]:
    """Return what to believe of the times that peers tell of themselves, in seconds.

    No time counts as the slowest. One far below the others counts as an eighth of their median, so that it cannot take
    every route by a claim.
    """
    known = sorted(seconds for seconds in told if seconds > 0)
    if not known:
        return list(told)
    least = known[len(known) // 2] / 8
    return [max(seconds, least) if seconds > 0 else known[-1] for seconds in told]


def _best_speculation(member: Member, drafting: Sequence[Member]) -> Speculation:
    """Return how a request that `member` coordinates will speculate: with its own drafter or with a neighbour's."""
    own = member.record.profile
    found = [speculation_of(own.drafter, own.draft_us / 1e6)]
    for other in drafting:
        round_trip_s = member.neighbours_s.get(other.peer)
        if round_trip_s is not None and other.record.profile.draft_us:
            profile = other.record.profile
            offer = Offer(drafter=profile.drafter, step_s=profile.draft_us / 1e6, round_trip_s=round_trip_s)
            found.append(speculation_of(offer.drafter, offer.level_s))
    return min(found, key=lambda each: seconds_per_token(USUAL_TRAVERSAL_S, 0.0, each))


def _ranges(layers: Sequence[int]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer + 1 for layer in layers if layer + 1 not in layers]
    return ", ".join(f"[{start}, {end})" for start, end in zip(starts, ends, strict=True))


def _names(peers: Collection[str]) -> str:
    return ", ".join(short_peer(peer) for peer in sorted(peers))
