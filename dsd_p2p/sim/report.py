"""Sums up a run: latencies, throughput, acceptance, windows, utilisation and queues.

It also writes the run's timeline for chrome://tracing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from dsd_p2p.sim.fleet import FleetRun, StageReport
from dsd_p2p.sim.request import RequestLog


class Quantiles(msgspec.Struct, frozen=True):
    """Mean and percentiles, in seconds unless said otherwise; NaN without samples."""

    mean: float
    p50: float
    p95: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run.

    tpot_s: time per token after the first arrival. tokens_per_s: of all requests together.
    goodput_per_s: requests per second that met both of the workload's limits.
    acceptance: committed share of the verified drafted tokens (sent and not stale).
    mean_accepted_length: committed tokens per epoch. windows: number of verdicts by the mode and depth then in force.
    network_s: mean time that a request's messages spent on the links between drafter and target.
    stale_share: share of the sent nodes that were stale.
    littles_law: requests under way, averaged over time, divided by the arrival rate times the mean time in the system;
        1 if all requests have ended.
    """

    name: str
    seed: int
    num_requests: int
    num_failed: int
    num_unfinished: int
    num_leaked: int
    duration_s: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    total_s: Quantiles
    requests_per_s: float
    tokens_per_s: float
    goodput_per_s: float
    acceptance: float
    mean_accepted_length: float
    windows: dict[str, int]
    num_windows: int
    num_replays: int
    network_s: float
    stale_share: float
    target_busy_share: float
    littles_law: float
    stages: list[dict[str, float]]


def summarise(run: FleetRun) -> Report:
    """Return the figures of a run."""
    logs, workload = run.logs, run.scenario.workload
    done = [log for log in logs if not log.error and log.num_tokens]
    num_tokens = sum(log.num_tokens for log in done)
    span_s = max((log.finished_s for log in logs), default=0.0) - min((log.arrived_s for log in logs), default=0.0)
    span_s = max(span_s, 1e-12)
    sent, stale = _total(done, "num_nodes_sent") - _total(done, "num_prefill_tokens"), _total(done, "num_stale_nodes")
    num_epochs = _total(done, "num_epochs")
    # The first node of each epoch is the target's own token, not a draft; so is the text's first token.
    verified = max(0.0, sent - stale - num_epochs)
    accepted = max(0.0, num_tokens - num_epochs)
    windows: Counter[str] = Counter()
    for log in logs:
        windows.update(log.decisions)
    times_s = [log.finished_s - log.arrived_s for log in logs]
    good = sum(log.first_s - log.arrived_s <= workload.slo_ttft and not log.tpot_s > workload.slo_tpot for log in done)
    in_system = len(logs) / run.duration_s * (sum(times_s) / len(times_s)) if logs and run.duration_s else math.nan
    return Report(
        name=run.scenario.name,
        seed=run.scenario.seed,
        num_requests=len(logs),
        num_failed=len(logs) - len(done),
        num_unfinished=run.num_unfinished,
        num_leaked=run.num_leaked,
        duration_s=run.duration_s,
        ttft_s=quantiles(log.first_s - log.arrived_s for log in done),
        tpot_s=quantiles(log.tpot_s for log in done if log.num_tokens > log.first_size),
        total_s=quantiles(log.finished_s - log.arrived_s for log in done),
        requests_per_s=len(done) / span_s,
        tokens_per_s=num_tokens / span_s,
        goodput_per_s=good / span_s,
        acceptance=accepted / verified if verified else math.nan,
        mean_accepted_length=num_tokens / num_epochs if num_epochs else math.nan,
        windows=dict(windows.most_common()),
        num_windows=int(_total(logs, "num_windows")),
        num_replays=int(_total(logs, "num_replays")),
        network_s=sum(log.network_s for log in done) / max(1, len(done)),
        stale_share=stale / sent if sent else 0.0,
        target_busy_share=_mean([stage.busy_share for stage in run.stages]),
        littles_law=run.mean_under_way / in_system if in_system else math.nan,
        stages=[_stage(stage) for stage in run.stages],
    )


def quantiles(values: Iterable[float]) -> Quantiles:
    """Return mean and percentiles (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return Quantiles(math.nan, math.nan, math.nan, math.nan)
    p50, p95, p99 = (ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.95, 0.99))
    return Quantiles(math.fsum(ordered) / len(ordered), p50, p95, p99)


def rows(run: FleetRun) -> list[dict[str, object]]:
    """Return one row per request, for CSV."""
    return [
        {
            "request": log.number,
            "target": log.target,
            "arrived_s": log.arrived_s,
            "ttft_s": log.first_s - log.arrived_s,
            "tpot_s": log.tpot_s,
            "total_s": log.finished_s - log.arrived_s,
            "prompt_tokens": log.num_prompt_tokens,
            "tokens": log.num_tokens,
            "network_s": log.network_s,
            "switches": log.num_switches,
            "error": log.error,
            **log.counts,
        }
        for log in sorted(run.logs, key=lambda log: log.number)
    ]


def chrome_trace(run: FleetRun) -> bytes:
    """Return the timeline of a recorded run in Chrome's trace format: passes by stage, requests with their arrivals."""
    events: list[dict[str, object]] = []
    targets = {
        stage.target: index for index, stage in enumerate({stage.target: stage for stage in run.stages}.values())
    }
    events.extend(
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for name, pid in targets.items()
    )
    for target, stage, start_s, end_s, num_windows, num_nodes in run.passes:
        events.append(
            {
                "ph": "X",
                "name": f"{num_nodes} nodes",
                "pid": targets[target],
                "tid": stage,
                "ts": round(start_s * 1e6, 1),
                "dur": round((end_s - start_s) * 1e6, 1),
                "args": {"windows": num_windows, "nodes": num_nodes},
            }
        )
    requests_pid = len(targets)
    events.append({"ph": "M", "name": "process_name", "pid": requests_pid, "args": {"name": "requests"}})
    for log in run.logs:
        lane = {"pid": requests_pid, "tid": log.number}
        events.append(
            {
                "ph": "X",
                "name": f"request {log.number}",
                **lane,
                "ts": round(log.arrived_s * 1e6, 1),
                "dur": round((log.finished_s - log.arrived_s) * 1e6, 1),
                "args": {"tokens": log.num_tokens, "target": log.target, "error": log.error},
            }
        )
        events.extend(
            {"ph": "i", "s": "t", "name": f"+{size}", **lane, "ts": round(at_s * 1e6, 1)}
            for at_s, size in log.arrivals or ()
        )
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def _stage(stage: StageReport) -> dict[str, float]:
    return {
        "busy_share": stage.busy_share,
        "mean_queue": stage.mean_queue,
        "windows": stage.num_served,
        "passes": stage.num_passes,
        "mean_batch": stage.num_served / max(1, stage.num_passes),
    }


def _total(logs: Sequence[RequestLog], name: str) -> float:
    return math.fsum(log.counts.get(name, 0) for log in logs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
