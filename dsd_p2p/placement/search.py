"""Finds the routes of least traversal under a limit on the slowest stage, for many starts and limits at once.

How it works. A route's cost is a sum (its traversal) and a maximum (its slowest stage). For a fixed limit on the
maximum, the least sum is a shortest path: state (peer, end of its stage), step by step over the layers. All starts and
limits of a call are one axis of the arrays, so a swarm of some dozens of peers takes a handful of numpy calls a layer.
In a large swarm, only the nearest ends of stages are extended at each layer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.placement.view import PeerView, PlannedStage, SwarmView
from dsd_p2p.types import PeerId, Span

_MAX_EXTENDED = 48
"""Ends of stages that are extended at one layer: of more, those with the least traversal so far."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A swarm's peers that hold layers, as arrays.

    pass_s: seconds per layer of each peer. stage_s: the same, as it counts for the traversal: with a penalty for layers
    that must be computed again. link_s: `[P, P]`, infinite without a link and from a peer to itself.
    """

    num_layers: int
    names: Sequence[PeerId]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    pass_s: Floats
    stage_s: Floats
    link_s: Floats
    kept: Collection[PlannedStage] = ()

    @cached_property
    def active(self) -> list[NDArray[np.int64]]:
        """For each layer, the peers that hold it."""
        layers = np.arange(self.num_layers)[:, None]
        return _columns((self.first <= layers) & (layers < self.last))

    @cached_property
    def ending(self) -> list[NDArray[np.int64]]:
        """For each layer, the peers of which a stage can end before it."""
        layers = np.arange(self.num_layers + 1)[:, None]
        return _columns((self.first < layers) & (layers <= self.last))

    @cached_property
    def links_at(self) -> list[Floats]:
        """For each layer, the links to the peers that hold it from those of which a stage can end before it."""
        return [self.link_s[ending[:, None], active] for ending, active in zip(self.ending, self.active, strict=False)]

    @cached_property
    def index(self) -> dict[PeerId, int]:
        """The place of each peer."""
        return {name: index for index, name in enumerate(self.names)}

    def best_of_each_layer(self, scores: Floats, count: int) -> NDArray[np.int64]:
        """Return the peers that are among the `count` with the least score at some layer that they hold."""
        best = [active[np.argsort(scores[active], kind="stable")[:count]] for active in self.active]
        return np.unique(np.concatenate(best))

    def only(self, rows: NDArray[np.int64]) -> "Tables":
        """Return the swarm of these peers alone."""
        return Tables(
            num_layers=self.num_layers,
            names=[self.names[row] for row in rows.tolist()],
            first=self.first[rows],
            last=self.last[rows],
            pass_s=self.pass_s[rows],
            stage_s=self.stage_s[rows],
            link_s=self.link_s[np.ix_(rows, rows)],
            kept=self.kept,
        )

    def least_left(self, back_s: Floats) -> Floats:
        """Return the least seconds from the end of each peer's stage to the coordinator, `[P, layers + 1]`.

        back_s: `[P]`, seconds from each peer to the coordinator.
        """
        behind = least_traversals(self.reversed(), back_s[None], np.array([np.inf]))[0]
        left = np.full((len(self.names), self.num_layers + 1), np.inf)
        left[:, self.num_layers] = back_s
        for layer in range(1, self.num_layers):
            active = self.active[layer]
            if len(active):
                left[:, layer] = (self.link_s[:, active] + behind[active, self.num_layers - layer]).min(axis=1)
        return left

    def reversed(self) -> "Tables":
        """Return the swarm read from its last layer to its first."""
        kept = [
            PlannedStage(peer=each.peer, span=Span(self.num_layers - each.span.last, self.num_layers - each.span.first))
            for each in self.kept
        ]
        return replace(
            self,
            first=self.num_layers - self.last,
            last=self.num_layers - self.first,
            link_s=self.link_s.T,
            kept=kept,
        )


def tables_of(
    view: SwarmView, num_nodes: int, kept: Collection[PlannedStage] = (), refill_layer_s: float = 0.0
) -> Tables:
    """Return the arrays of a view.

    num_nodes: positions of a window. kept: stages that need not compute anything again; without any, none need.
    refill_layer_s: the penalty per layer of all others.
    """
    chosen = [index for index, peer in enumerate(view.peers) if peer.span is not None]
    peers: list[PeerView] = [view.peers[index] for index in chosen]
    spans = [peer.span for peer in peers if peer.span is not None]
    pass_s = np.array([peer.layer_pass_s(num_nodes) for peer in peers], np.float64)
    return Tables(
        num_layers=view.num_layers,
        names=[peer.peer for peer in peers],
        first=np.array([span.first for span in spans], np.int64),
        last=np.array([min(span.last, view.num_layers) for span in spans], np.int64),
        pass_s=pass_s,
        stage_s=pass_s + (refill_layer_s if kept else 0.0),
        link_s=view.link_matrix if len(chosen) == len(view.peers) else view.link_matrix[np.ix_(chosen, chosen)],
        kept=kept,
    )


def least_traversals(tables: Tables, start_s: Floats, limits_s: Floats) -> Floats:
    """Return the least seconds to the end of each peer's stage, `[B, P, layers + 1]`; infinite where there is no route.

    start_s: `[B, P]`, seconds from the coordinator to each peer. limits_s: `[B]`, the longest that a stage may take.
    """
    num_batch, num_peers = start_s.shape
    longest = int((tables.last - tables.first).max())
    # A hair more than the limit, because it is one of the products that it is compared with.
    most_layers = np.minimum(limits_s[:, None] / tables.pass_s * (1 + 1e-9), longest)
    # The longest stage comes first, as the starts before a layer do.
    lengths = np.arange(longest, 0, -1)
    stage_s = np.where(lengths[:, None, None] <= most_layers, lengths[:, None, None] * tables.stage_s, np.inf)
    arrivals = np.full((tables.num_layers, num_batch, num_peers), np.inf)
    least = np.full((tables.num_layers + 1, num_batch, num_peers), np.inf)
    kept_until = _by_end(tables)
    for end in range(1, tables.num_layers + 1):
        start = end - 1
        active = tables.active[start]
        if not len(active):
            break
        arrivals[start][:, active] = start_s[:, active] if not start else _arrivals(tables, least[start], start)
        num_starts = min(end, longest)
        (arrivals[end - num_starts : end] + stage_s[longest - num_starts :]).min(axis=0, out=least[end])
        for row, length in kept_until.get(end, ()):
            whole_s = arrivals[end - length][:, row] + tables.pass_s[row] * length
            allowed = length <= most_layers[:, row]
            least[end][allowed, row] = np.minimum(least[end][:, row], whole_s)[allowed]
    ends = np.arange(tables.num_layers + 1)[:, None]
    least.transpose(0, 2, 1)[(ends <= tables.first) | (ends > tables.last)] = np.inf
    return least.transpose(1, 2, 0)


def trace(tables: Tables, start_s: Floats, least: Floats, last: int) -> tuple[PlannedStage, ...]:
    """Return the stages of the route of one batch that ends with the peer `last`.

    start_s: `[P]`. least: `[P, layers + 1]`, from `least_traversals`.
    """
    stages: list[PlannedStage] = []
    peer, end = last, tables.num_layers
    kept = {(tables.index.get(each.peer, -1), each.span.first, each.span.last) for each in tables.kept}
    while end > 0:
        starts = np.arange(int(tables.first[peer]), end)
        lengths = end - starts
        stage_s = tables.stage_s[peer] * lengths
        if kept:
            is_kept = [(peer, start, end) in kept for start in starts.tolist()]
            stage_s[is_kept] = tables.pass_s[peer] * lengths[is_kept]
        before = np.where(starts[None] > 0, least[:, starts] + tables.link_s[:, peer, None], np.inf)
        arrival = before.min(axis=0)
        if starts[0] == 0:
            arrival[0] = start_s[peer]
        at = int(np.argmin(np.abs(arrival + stage_s - least[peer, end])))
        start = int(starts[at])
        stages.insert(0, PlannedStage(peer=tables.names[peer], span=Span(start, end)))
        if start:
            peer = int(np.argmin(before[:, at]))
        end = start
    return tuple(stages)


def _columns(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Return the columns that are set in each row."""
    columns = mask.nonzero()[1]
    ends = mask.sum(axis=1).cumsum().tolist()
    return [columns[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _by_end(tables: Tables) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for stage in tables.kept:
        row = tables.index.get(stage.peer)
        if row is not None and tables.first[row] <= stage.span.first and stage.span.last <= tables.last[row]:
            found.setdefault(stage.span.last, []).append((row, stage.span.num_layers))
    return found


def _arrivals(tables: Tables, least: Floats, start: int) -> Floats:
    """Return the least seconds, `[B, active]`, at which a window can arrive at each peer for a stage from `start`.

    least: `[B, P]`, the least seconds to the end of each peer's stage before it.
    """
    ending, links_s = tables.ending[start], tables.links_at[start]
    so_far = least[:, ending]
    if len(ending) > _MAX_EXTENDED:
        nearest = np.argpartition(so_far.min(axis=0), _MAX_EXTENDED)[:_MAX_EXTENDED]
        so_far, links_s = so_far[:, nearest], links_s[nearest]
    arrivals: Floats = (so_far[:, :, None] + links_s).min(axis=1)
    return arrivals
