"""Exports Prometheus metrics of a gateway and of the swarm as it sees it."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsd_p2p.telemetry.picture import Picture
from node.gateway.admission import Admission
from node.gateway.writing import Writing

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class GatewayMetrics:
    """The metrics. It counts requests when they end and reads everything else when it is scraped."""

    def __init__(self, picture: Picture, admission: Admission | None = None) -> None:
        self.admission = admission
        self._registry = CollectorRegistry()
        self._requests = Counter("dsd_requests_total", "Requests by HTTP status", ["status"], registry=self._registry)
        self._prompt = Counter("dsd_prompt_tokens_total", "Prompt tokens", registry=self._registry)
        self._cached = Counter(
            "dsd_prompt_tokens_cached_total", "Prompt tokens that stages still held", registry=self._registry
        )
        self._tokens = Counter("dsd_generation_tokens_total", "Tokens written", registry=self._registry)
        self._ttft = Histogram("dsd_time_to_first_token_seconds", "TTFT", buckets=_SECONDS, registry=self._registry)
        self._tpot = Histogram("dsd_time_per_output_token_seconds", "TPOT", buckets=_SECONDS, registry=self._registry)
        self._registry.register(_PictureCollector(picture, self))

    def note(self, writing: Writing, status: int) -> None:
        """Count a request that has ended."""
        self._requests.labels(str(status)).inc()
        self._prompt.inc(writing.num_prompt_tokens)
        self._cached.inc(writing.num_cached_tokens)
        for choice in writing.choices:
            self._tokens.inc(choice.num_tokens)
            if (statistics := choice.outcome.statistics) is None:
                continue
            timing = statistics.timing
            self._ttft.observe(timing.ttft_s)
            if timing.num_later_tokens:
                self._tpot.observe(timing.later_s / timing.num_later_tokens)

    def note_refused(self, status: int) -> None:
        """Count a request that was refused before anything was written."""
        self._requests.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _PictureCollector(Collector):
    def __init__(self, picture: Picture, metrics: GatewayMetrics) -> None:
        self._picture = picture
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        picture, totals = self._picture, self._picture.totals
        yield GaugeMetricFamily("dsd_sessions_running", "Requests under way", len(picture.running))
        yield GaugeMetricFamily("dsd_tokens_per_second", "Tokens a second of all requests", picture.tokens_per_s)
        for name, text in (
            ("windows", "Windows sent"),
            ("nodes", "Draft nodes sent"),
            ("misses", "Committed tokens that no sent node held"),
            ("stale", "Nodes that were stale when they arrived"),
            ("relaxed", "Tokens accepted by relaxed verification"),
        ):
            yield CounterMetricFamily(f"dsd_{name}", text, totals[f"num_{name}"])
        yield CounterMetricFamily("dsd_replays", "Replays over another route after a stage was lost", totals["replays"])
        acceptance = GaugeMetricFamily(
            "dsd_acceptance_ratio", "Share of draft levels that held the committed token", labels=["depth"]
        )
        for depth, share in enumerate(picture.acceptance(), start=1):
            acceptance.add_metric([str(depth)], share)
        yield acceptance
        if (admission := self._metrics.admission) is not None:
            yield GaugeMetricFamily("dsd_answers_running", "Answers being written", admission.num_running)
            yield GaugeMetricFamily("dsd_answers_waiting", "Answers that wait for a place", admission.num_waiting)
        yield from self._peers()

    def _peers(self) -> Iterator[Metric]:
        gauges = {
            "up": GaugeMetricFamily("dsd_peer_up", "1 while a peer is online", labels=["peer"]),
            "busy": GaugeMetricFamily("dsd_stage_busy_ratio", "Share of time in passes", labels=["peer"]),
            "queue": GaugeMetricFamily("dsd_stage_queue_windows", "Windows waiting", labels=["peer"]),
            "sessions": GaugeMetricFamily("dsd_stage_sessions", "Sessions open", labels=["peer"]),
            "cache": GaugeMetricFamily("dsd_stage_cache_bytes", "Cache in use", labels=["peer"]),
            "room": GaugeMetricFamily("dsd_stage_cache_limit_bytes", "Cache limit", labels=["peer"]),
        }
        for peer, status in self._picture.peers.items():
            gauges["up"].add_metric([peer], float(status.is_online and not self._picture.is_silent(peer)))
            for name, value in (
                ("busy", status.busy_share),
                ("queue", status.queue),
                ("sessions", status.num_sessions),
                ("cache", status.cache_bytes),
                ("room", status.max_cache_bytes),
            ):
                gauges[name].add_metric([peer], value)
        yield from gauges.values()
