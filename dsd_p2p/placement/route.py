"""Chooses a request's route: the one with the fewest predicted seconds per token over all layers that peers hold."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dsd_p2p.placement.view import PeerView, Plan, PlannedStage, Speculation, SwarmView, seconds_per_token
from dsd_p2p.types import PeerId, Span

_MAX_HOPS = 64
_MAX_BOUNDARIES = 40
_REFILL_LAYER_S = 0.02
"""Penalty per layer whose keys and values must be computed again: a stage that still has them is worth a detour."""

_MAX_LABELS = 8
"""Partial routes kept per peer and end layer, none of which is better than another in everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detour:
    """The peers and links (in either direction) that a replacement route must avoid, and the stages it should keep."""

    peers: frozenset[str] = frozenset()
    links: frozenset[tuple[str, str]] = frozenset()
    kept: frozenset[PlannedStage] = frozenset()

    def without(self, view: SwarmView) -> SwarmView:
        """Return the view without the avoided peers and links."""
        links = {
            (a, b): seconds
            for (a, b), seconds in view.one_way_s.items()
            if (a, b) not in self.links and (b, a) not in self.links
        }
        peers = tuple(peer for peer in view.peers if peer.peer not in self.peers)
        return replace(view, peers=peers, one_way_s=links)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partial:
    """A route up to some layer. previous: the route before its last stage."""

    traversal_s: float
    slowest_s: float
    last: PlannedStage
    previous: "_Partial | None"
    num_hops: int

    def visits(self, peer: PeerId) -> bool:
        partial: _Partial | None = self
        while partial is not None:
            if partial.last.peer == peer:
                return True
            partial = partial.previous
        return False

    def stages(self) -> tuple[PlannedStage, ...]:
        return (*(self.previous.stages() if self.previous else ()), self.last)


def choose_route(
    view: SwarmView,
    coordinator: PeerId,
    speculation: Speculation | None = None,
    detour: Detour | None = None,
) -> Plan | None:
    """Return the fastest route from `coordinator` and back; None if the model is not covered or cannot be reached.

    A stage may run fewer layers than its peer holds, so that overlapping spans fit together and slow peers get fewer
    layers.
    """
    speculation = speculation or Speculation()
    view = detour.without(view) if detour else view
    peers = [peer for peer in view.peers if peer.span is not None]
    kept = detour.kept if detour else frozenset()
    boundaries = _boundaries(view, peers, kept)
    ending: dict[int, dict[PeerId, list[_Partial]]] = {}
    for start in boundaries[:-1]:
        for peer in peers:
            span = peer.span
            if span is None or not span.first <= start < span.last:
                continue
            for before, link_s in _ways_to(peer.peer, start, view, coordinator, ending):
                for end in boundaries:
                    if start < end <= span.last:
                        stage = PlannedStage(peer=peer.peer, span=Span(start, end))
                        refill_s = _REFILL_LAYER_S * (end - start) if kept and stage not in kept else 0.0
                        partial = _extend(before, link_s + refill_s, peer, stage, speculation.window_nodes)
                        _keep(ending.setdefault(end, {}).setdefault(peer.peer, []), partial)
    return _best(ending.get(view.num_layers, {}), view, coordinator, speculation)


def _boundaries(view: SwarmView, peers: list[PeerView], kept: Iterable[PlannedStage]) -> list[int]:
    """Return the layers at which one stage may hand over to the next: the ends of all spans, and a grid between."""
    step = -(-view.num_layers // _MAX_BOUNDARIES)
    spans = [*(peer.span for peer in peers if peer.span), *(stage.span for stage in kept)]
    ends = {end for span in spans for end in (span.first, span.last)}
    return sorted({*range(0, view.num_layers, step), view.num_layers, *ends})


def _ways_to(
    peer: PeerId, start: int, view: SwarmView, coordinator: PeerId, ending: dict[int, dict[PeerId, list[_Partial]]]
) -> Iterator[tuple[_Partial | None, float]]:
    if start == 0:
        link_s = view.link_s(coordinator, peer)
        if link_s is not None:
            yield None, link_s
        return
    for previous, partials in list(ending.get(start, {}).items()):
        link_s = view.link_s(previous, peer)
        if link_s is None:
            continue
        for partial in partials:
            if partial.num_hops < _MAX_HOPS and not partial.visits(peer):
                yield partial, link_s


def _extend(before: _Partial | None, link_s: float, peer: PeerView, stage: PlannedStage, num_nodes: int) -> _Partial:
    pass_s = peer.layer_pass_s(num_nodes) * stage.span.num_layers
    return _Partial(
        traversal_s=(before.traversal_s if before else 0.0) + link_s + pass_s,
        slowest_s=max(before.slowest_s if before else 0.0, pass_s),
        last=stage,
        previous=before,
        num_hops=(before.num_hops if before else 0) + 1,
    )


def _keep(labels: list[_Partial], new: _Partial) -> None:
    """Add `new` unless another is at least as good in everything; drop those that it beats."""
    if any(old.traversal_s <= new.traversal_s and old.slowest_s <= new.slowest_s for old in labels):
        return
    labels[:] = [old for old in labels if old.traversal_s < new.traversal_s or old.slowest_s < new.slowest_s]
    labels.append(new)
    labels.sort(key=lambda label: label.traversal_s)
    del labels[_MAX_LABELS:]


def _best(
    complete: dict[PeerId, list[_Partial]], view: SwarmView, coordinator: PeerId, speculation: Speculation
) -> Plan | None:
    best: Plan | None = None
    for peer, partials in sorted(complete.items()):
        back_s = view.link_s(peer, coordinator)
        if back_s is None:
            continue
        for partial in partials:
            traversal_s = partial.traversal_s + back_s
            cost_s = seconds_per_token(traversal_s, partial.slowest_s, speculation)
            if best is None or cost_s < best.s_per_token:
                best = Plan(
                    stages=partial.stages(),
                    traversal_s=traversal_s,
                    slowest_s=partial.slowest_s,
                    s_per_token=cost_s,
                )
    return best
