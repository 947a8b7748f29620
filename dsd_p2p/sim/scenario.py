"""What a scenario says: drafters, targets or peers, links and workload (docs/simulator.md)."""

from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.balance import Routing
from dsd_p2p.sim.answer import AgreementModel
from dsd_p2p.sim.service import PassCost, Spread
from dsd_p2p.sim.target import Batching

MAX_PEERS = 64
"""Limit of peers in a simulated swarm: placement looks at every pair of them."""

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Seconds(float):
    """A duration, written as `30ms`, `2s`, `1h`."""


class BitsPerSecond(float):
    """A bandwidth, written as `100mbit`."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Link(_Table, frozen=True, kw_only=True):
    """A link. latency: one way. back_latency: latency of the way back, if it differs."""

    latency: Seconds = Seconds(0)
    back_latency: Seconds | None = None
    jitter: Seconds = Seconds(0)
    bandwidth: BitsPerSecond = BitsPerSecond(0)
    loss: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    stall_every: Seconds = Seconds(0)
    stall: Seconds = Seconds(0)

    def models(self) -> tuple[LinkModel, LinkModel]:
        """Return the models of the way there and the way back."""
        there = LinkModel(
            latency_s=self.latency,
            jitter_s=self.jitter,
            bandwidth_bps=self.bandwidth,
            loss=self.loss,
            stall_every_s=self.stall_every,
            stall_s=self.stall,
        )
        return there, there if self.back_latency is None else replace(there, latency_s=self.back_latency)


class Cost(_Table, frozen=True, kw_only=True):
    """Seconds of a pass: `fixed + per_node * n + per_window * (windows - 1)`, or measured `points` of [n, seconds].

    per_context: seconds that attention adds for each position of the text before a window.
    """

    fixed: Seconds = Seconds(0)
    per_node: Seconds = Seconds(0)
    per_window: Seconds = Seconds(0)
    per_context: Seconds = Seconds(0)
    points: tuple[tuple[Annotated[int, Meta(ge=0, le=1_000_000)], Annotated[float, Meta(ge=0)]], ...] = ()

    def pass_cost(self) -> PassCost:
        """Return the cost as a curve.

        Raises:
            ConfigError: the points do not ascend.
        """
        if not self.points:
            return PassCost.line(self.fixed, self.per_node, self.per_window, self.per_context)
        nodes = tuple(n for n, _ in self.points)
        if list(nodes) != sorted(set(nodes)):
            raise ConfigError(f"points {list(nodes)}: the numbers of nodes must ascend")
        return PassCost(
            nodes=nodes,
            seconds=tuple(s for _, s in self.points),
            per_window_s=self.per_window,
            per_context_s=self.per_context,
        )


class DrafterPool(_Table, frozen=True, kw_only=True):
    """Machines that draft and start requests. step: cost of one draft step over n stems."""

    count: Count = 1
    link: str
    step: Cost


class TargetPool(_Table, frozen=True, kw_only=True):
    """Targets of one kind.

    stages: number of stages of each target. stage: cost of one stage's pass. inner_link: the link between stages.
    max_batch: most windows in one pass. cores: shared by the stages of one target; 0: each has its own machine.
    draft_step: cost of a draft step at the target, for `placement = "target"`.
    """

    count: Count = 1
    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    stage: Cost
    inner_link: str = ""
    hidden_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    batching: Batching = Batching.FIFO
    spread: Spread = Spread.NONE
    cores: Annotated[float, Meta(ge=0, le=4096)] = 0.0
    draft_step: Cost | None = None


class PeerPool(_Table, frozen=True, kw_only=True):
    """Peers of one kind. Each holds some of the model's `layers`, which the live placement code chooses when it joins.

    max_layers: number of layers that fit into a peer's memory. layer: cost of one layer's pass.
    link: the peer's own link; messages also pass the other machine's own link.
    load: time to load one layer, when a peer must take over layers that no peer holds.
    """

    count: Count = 1
    max_layers: Annotated[int, Meta(ge=1, le=1024)]
    layer: Cost
    link: str
    load: Seconds = Seconds(0)
    hidden_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    batching: Batching = Batching.FIFO
    spread: Spread = Spread.NONE


class Length(_Table, frozen=True, kw_only=True):
    """A length in tokens, between 1 and `most`.

    It is log-normal with this mean and coefficient of variation; with `variation = 0` it is constant.
    """

    mean: Annotated[float, Meta(ge=1, le=1_000_000)]
    variation: Annotated[float, Meta(ge=0, le=10)] = 0.0
    most: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096


class Workload(_Table, frozen=True, kw_only=True):
    """The requests of a run.

    arrivals: "poisson" or "gamma" at `rate` requests per second; "closed" with `concurrency` requests under way at any
        time (a drafter starts its next request after `think`); or "trace", read from `file`, which has one JSON object
        a line (arrival_s, prompt_tokens, answer_tokens).
    burstiness: coefficient of variation of gamma arrivals.
    slo_ttft, slo_tpot: the limits of a good request; they also set its deadline.
    """

    requests: Annotated[int, Meta(ge=1, le=100_000_000)]
    arrivals: Annotated[str, Meta(pattern="^(poisson|gamma|closed|trace)$")] = "poisson"
    rate: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    burstiness: Annotated[float, Meta(gt=0, le=100)] = 1.0
    concurrency: Count = 1
    think: Seconds = Seconds(0)
    file: str = ""
    prompt: Length = Length(mean=64)
    answer: Length = Length(mean=64)
    slo_ttft: Seconds = Seconds(2)
    slo_tpot: Seconds = Seconds(0.1)


class Acceptance(_Table, frozen=True, kw_only=True):
    """How often drafts are right, by parameters (`dsd_p2p.sim.answer.AgreementModel`) or by recorded agreement.

    trace: "bundled", or a file made by `dsd sim record`. category: use only its texts of this kind.
    """

    rate: Share = 0.8
    persistence: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    num_candidates: Annotated[int, Meta(ge=1, le=16)] = 4
    trace: str = ""
    category: str = ""

    def agreement(self) -> AgreementModel:
        """Return the parameters."""
        return AgreementModel(rate=self.rate, persistence=self.persistence, num_candidates=self.num_candidates)


class Speculation(_Table, frozen=True, kw_only=True):
    """How windows are chosen.

    policy: "plain", "static" (`depth`), "tree" (`width`, `window_nodes`, `in_flight`), "threshold", "analytic" or
        "learned".
    modes: the modes that "analytic" and "learned" may choose from.
    mode: "distributed" (the drafter's machine coordinates), "fused" (the target writes alone), "auto" (fused while the
        policy does not speculate). placement: where drafter and coordinator sit, "drafter" or "target".
    """

    policy: Annotated[str, Meta(pattern="^(plain|static|tree|threshold|analytic|learned)$")] = "static"
    modes: tuple[Annotated[str, Meta(pattern="^(sync|continuous)$")], ...] = ("sync", "continuous")
    depth: Annotated[int, Meta(ge=1, le=64)] = 4
    width: Annotated[int, Meta(ge=1, le=16)] = 4
    window_nodes: Annotated[int, Meta(ge=1, le=256)] = 8
    in_flight: Annotated[int, Meta(ge=1, le=512)] = 64
    mode: Annotated[str, Meta(pattern="^(distributed|fused|auto)$")] = "distributed"
    placement: Annotated[str, Meta(pattern="^(drafter|target)$")] = "drafter"
    routing: Routing = Routing.SHORTEST_QUEUE
    prefill_chunk: Annotated[int, Meta(ge=1, le=4096)] = 128
    remembers: bool = True


class Churn(_Table, frozen=True, kw_only=True):
    """Failures of targets and peers.

    up, down: mean times, exponentially distributed; with `up = 0` nothing fails.
    notice: time until a failure is noticed.
    """

    up: Seconds = Seconds(0)
    down: Seconds = Seconds(30)
    notice: Seconds = Seconds(1)


class Scenario(_Table, frozen=True, kw_only=True):
    """A whole scenario.

    Either whole `targets` verify, or `peers` that share the model's `layers`. horizon: the latest end of the run.
    """

    name: str = ""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    horizon: Seconds = Seconds(1e7)
    links: dict[str, Link]
    drafters: Annotated[tuple[DrafterPool, ...], Meta(min_length=1, max_length=64)]
    targets: Annotated[tuple[TargetPool, ...], Meta(max_length=64)] = ()
    peers: Annotated[tuple[PeerPool, ...], Meta(max_length=64)] = ()
    layers: Annotated[int, Meta(ge=0, le=1024)] = 0
    workload: Workload
    acceptance: Acceptance = Acceptance()
    speculation: Speculation = Speculation()
    churn: Churn = Churn()
