"""Reproduces the figures of the two papers in the simulator and shows them beside the papers' own (docs/simulator.md).

Run as `scripts/reproduce`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dsd_p2p.netmodel import LinkModel
from dsd_p2p.sim.answer import AgreementModel, ParametricAnswer
from dsd_p2p.sim.report import Report
from dsd_p2p.sim.route import RouteModel, SimulatedRequest, simulate_request
from dsd_p2p.sim.scenario_file import changed, read_scenario
from dsd_p2p.sim.service import PassCost
from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain
from dsd_p2p.window.tracker import Tracker
from node.console import ConsoleProgress
from node.lab.receipt import machine, print_table, write_receipt
from node.lab.simulator.bundled import find_scenario
from node.lab.simulator.simulation import Change, sweep

_SCENARIO = find_scenario("paper-b")

_WORKLOADS: dict[str, Change] = {
    "GSM8K": {"workload.prompt.mean": 80, "workload.answer.mean": 130, "acceptance.rate": 0.82},
    "CNN/DailyMail": {"workload.prompt.mean": 800, "workload.answer.mean": 80, "acceptance.rate": 0.72},
    "HumanEval": {"workload.prompt.mean": 150, "workload.answer.mean": 150, "acceptance.rate": 0.86},
}
"""The lengths are those of the collections. The paper gives no acceptance rates; these are typical of two models of one
family.
"""

_POLICIES: dict[str, Change] = {
    "random, γ=4": {"speculation.routing": "random"},
    "round-robin, γ=4": {"speculation.routing": "round-robin"},
    "JSQ, γ=4": {},
    "JSQ, LAB, γ=4": {"targets.batching": "length-aware"},
    "JSQ, threshold": {"speculation.policy": "threshold"},
    "JSQ, analytic": {"speculation.policy": "analytic", "speculation.mode": "auto"},
    "JSQ, AWC": {"speculation.policy": "learned", "speculation.mode": "auto"},
}
_STATIC, _AWC = "JSQ, γ=4", "JSQ, AWC"
_EVERYWHERE = (_STATIC, "JSQ, threshold", _AWC)
_DRAFTERS = (600, 1000)
_RTT_MS = (10, 30)
_CROSSOVER_RTT_MS = (5, 20, 40, 50, 60, 80, 120)

_AGREEMENT = AgreementModel(rate=0.8, persistence=0.5, num_candidates=8)
_DEPTH = 8
"""γ of paper A."""

_NODES = (2, 4, 8, 16)
_LATENCY_RATIOS = (1.0, 3.0, 5.0, 10.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grids of both papers and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/reproduce", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="requests in each cell of paper B (default 2000)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell (the paper: 3)")
    parser.add_argument("--processes", type=int, default=0, help="processes to use (default: one for each core)")
    parser.add_argument("--receipt", metavar="NAME", help="write docs/benchmarks/NAME.json")
    options = parser.parse_args(arguments)
    before = machine()
    with ConsoleProgress() as progress:
        results: dict[str, object] = {
            "paper_a": paper_a(),
            "paper_b": _grid(options.requests, options.seeds, options.processes, progress),
            "crossover": _crossover(options.requests // 2, options.processes, progress),
        }
    if options.receipt:
        write_receipt(options.receipt, "reproduce", results, before, program="scripts/reproduce")
    return 0


# Paper A


def paper_a() -> list[dict[str, float]]:
    """Return the speed-ups over plain decoding by number of peers (N) and t1 / t0.

    Each row has the paper's formula, its algorithm simulated, and our continuous tree.
    """
    rows = []
    for num_nodes in _NODES:
        for ratio in _LATENCY_RATIOS:
            plain = _write(num_nodes, ratio, PLAIN, 40)
            sync = _write(num_nodes, ratio, sync_chain(_DEPTH), 400)
            tree = continuous_tree(depth=96, width=4, window_nodes=8, max_in_flight=128, min_path_prob=0.02)
            continuous = _write(num_nodes, ratio, tree, 400)
            accepted = len(sync.tokens) / sync.stats.num_epochs
            # t0 = 1: S = [t0 + (N-1) t1] / [t0 / rho + (N-1) t1 / k], rho = k / (gamma + 1).
            formula = (1 + (num_nodes - 1) * ratio) / ((_DEPTH + 1) / accepted + (num_nodes - 1) * ratio / accepted)
            rows.append(
                {
                    "nodes": num_nodes,
                    "t1_over_t0": ratio,
                    "accepted": accepted,
                    "formula": formula,
                    "synchronous": sync.timing.tokens_per_s / plain.timing.tokens_per_s,
                    "continuous": continuous.timing.tokens_per_s / plain.timing.tokens_per_s,
                    "communication_saved": (accepted - 1) / accepted,
                }
            )
    print_table(
        ("nodes", "t1/t0", "accepted", "paper's formula", "synchronous γ=8", "continuous tree", "communication saved"),
        [
            (
                str(row["nodes"]),
                f"{row['t1_over_t0']:g}",
                f"{row['accepted']:.2f}",
                f"{row['formula']:.2f}",
                f"{row['synchronous']:.2f}",
                f"{row['continuous']:.2f}",
                f"{row['communication_saved']:.0%}",
            )
            for row in rows
        ],
    )
    return rows


def _write(num_nodes: int, ratio: float, decision: Decision, num_tokens: int) -> SimulatedRequest:
    """Simulate one text on `num_nodes` peers with links of latency t1.

    Together they compute for t0 = 10 ms a window, however many positions it has.
    """
    t0_s = 0.01
    route = RouteModel(
        stages=(PassCost.line(t0_s / num_nodes, 0.0),) * num_nodes,
        link=LinkModel(latency_s=t0_s * ratio),
        up=LinkModel(),
        draft=PassCost.line(0.05 * t0_s, 0.0),
    )
    return simulate_request(ParametricAnswer(_AGREEMENT, 7), route, StaticPolicy(decision), Tracker(), num_tokens)


# Paper B


def _grid(num_requests: int, num_seeds: int, num_processes: int, progress: ConsoleProgress) -> list[dict[str, Any]]:
    scenario = changed(read_scenario(_SCENARIO), {"workload.requests": num_requests})
    cells = [
        (name, count, rtt_ms, policy)
        for name in _WORKLOADS
        for count in _DRAFTERS
        for rtt_ms in _RTT_MS
        for policy in _POLICIES
        # One cell gets all policies, to show the gain of each.
        if policy in _EVERYWHERE or (name, count, rtt_ms) == ("GSM8K", _DRAFTERS[0], _RTT_MS[0])
    ]
    points: list[Change] = [
        {
            **_WORKLOADS[name],
            "drafters.count": count,
            "workload.concurrency": count,
            "links.edge.latency": f"{rtt_ms / 2}ms",
            **_POLICIES[policy],
        }
        for name, count, rtt_ms, policy in cells
    ]
    reports = [cell.reports for cell in sweep(scenario, points, num_seeds, progress, num_processes)]
    rows: list[dict[str, Any]] = [
        {"workload": name, "drafters": count, "rtt_ms": rtt_ms, "policy": policy, **_numbers(of_cell)}
        for (name, count, rtt_ms, policy), of_cell in zip(cells, reports, strict=True)
    ]
    by_cell = {(row["workload"], row["drafters"], row["rtt_ms"], row["policy"]): row for row in rows}
    table = []
    for name, count, rtt_ms, policy in cells:
        row, static = by_cell[name, count, rtt_ms, policy], by_cell[name, count, rtt_ms, _STATIC]
        gain = row["requests_per_s"] / static["requests_per_s"] - 1
        row["gain"] = gain
        table.append(
            (
                f"{name}, {count}, {rtt_ms} ms",
                policy,
                f"{row['requests_per_s']:.1f}",
                f"{gain:+.1%}",
                f"{1e3 * row['tpot_s']:.1f}",
                f"{1e3 * row['ttft_s']:.0f}",
            )
        )
    print_table(("cell", "policy", "requests/s", "over γ=4", "TPOT ms", "TTFT ms"), table)
    gains = [row["gain"] for row in rows if row["policy"] == _AWC]
    print_table(("", ""), [("AWC over static γ=4", f"{min(gains):+.1%} .. {max(gains):+.1%}")])
    return rows


def _numbers(reports: Sequence[Report]) -> dict[str, float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "requests_per_s": mean([report.requests_per_s for report in reports]),
        "tokens_per_s": mean([report.tokens_per_s for report in reports]),
        "tpot_s": mean([report.tpot_s.mean for report in reports]),
        "ttft_s": mean([report.ttft_s.mean for report in reports]),
        "acceptance": mean([report.acceptance for report in reports]),
        "busy": mean([report.target_busy_share for report in reports]),
    }


def _crossover(num_requests: int, num_processes: int, progress: ConsoleProgress) -> list[dict[str, Any]]:
    """Compare distributed and fused mode over the round trip.

    The targets have one stage, or four stages with the same link between them.
    """
    base = read_scenario(_SCENARIO)
    points: list[Change] = []
    for stages in (1, 4):
        for rtt_ms in _CROSSOVER_RTT_MS:
            for mode in ("distributed", "fused"):
                points.append(
                    {
                        "workload.requests": num_requests,
                        "links.edge.latency": f"{rtt_ms / 2}ms",
                        "targets.stages": stages,
                        "targets.inner_link": "edge" if stages > 1 else "",
                        "targets.stage.fixed": f"{40 / stages}ms",
                        "speculation.mode": mode,
                    }
                )
    cells = sweep(base, points, 1, progress, num_processes)
    rows = []
    for distributed, fused in zip(cells[::2], cells[1::2], strict=True):
        tpots = [1e3 * cell.reports[0].tpot_s.mean for cell in (distributed, fused)]
        rows.append(
            {
                "stages": distributed.changes["targets.stages"],
                "rtt_ms": 2 * float(str(distributed.changes["links.edge.latency"]).removesuffix("ms")),
                "distributed_tpot_ms": tpots[0],
                "fused_tpot_ms": tpots[1],
            }
        )
    print_table(
        ("stages", "RTT ms", "distributed TPOT ms", "fused TPOT ms", "better"),
        [
            (
                str(row["stages"]),
                f"{row['rtt_ms']:g}",
                f"{row['distributed_tpot_ms']:.1f}",
                f"{row['fused_tpot_ms']:.1f}",
                "distributed" if row["distributed_tpot_ms"] < row["fused_tpot_ms"] else "fused",
            )
            for row in rows
        ],
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
