"""Implements `dsd bench simulator`: the simulator's speed and its memory."""

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

from dsd_p2p.models.progress import Progress
from dsd_p2p.sim.report import summarise
from dsd_p2p.sim.scenario import Scenario
from dsd_p2p.sim.scenario_file import changed, read_scenario
from node.lab.receipt import print_table
from node.lab.simulator.simulation import Change, run_scenario, sweep

_SCENARIO = Path("docs/scenarios/paper-b.toml")
_OPEN: Change = {"workload.arrivals": "poisson", "drafters.count": 1000, "acceptance.num_candidates": 1}
_WINDOWS: dict[str, Change] = {
    "plain": {"speculation.policy": "plain"},
    "static γ=4": {},
    "learned": {"speculation.policy": "learned"},
    "tree": {"speculation.policy": "tree", "acceptance.num_candidates": 4},
}
_DRAFTERS = (10, 100, 1000, 10_000)
_LOAD_OF_DRAFTER = 0.02
"""Requests a second of one drafter: the same for every drafter, so that ten times as many ask ten times as often."""


def run_simulator_bench(progress: Progress, num_big: int) -> dict[str, object]:
    """Measure windows a second by policy, and the cost by number of drafters.

    num_big: also simulate this many requests on all cores; 0 leaves that out.
    """
    base = changed(read_scenario(_SCENARIO), {**_OPEN, "workload.rate": 20, "workload.requests": 1500})
    windows = {}
    for name, change in _WINDOWS.items():
        progress.step(f"windows of {name}", 0, 0)
        windows[name] = _measure(changed(base, change))
    scaling = []
    for count in _DRAFTERS:
        progress.step(f"{count} drafters", 0, 0)
        scaled = {
            "drafters.count": count,
            "targets.count": max(1, count // 50),
            "workload.rate": count * _LOAD_OF_DRAFTER,
            "workload.requests": max(100, count),
        }
        scaling.append({"drafters": count, **_measure(changed(base, scaled))})
    results: dict[str, Any] = {"windows": windows, "scaling": scaling}
    if num_big:
        progress.step(f"1000 drafters, 20 targets, {num_big} requests", 0, 0)
        results["large"] = _on_all_cores(base, num_big, progress)
    rows = list(windows.items())
    rows += [(f"{each['drafters']:g} drafters", each) for each in scaling]
    print_table(
        ("", "windows/s", "µs a window", "requests", "CPU s", "peak MiB"),
        [
            (
                name,
                f"{each['windows_per_s']:.0f}",
                f"{1e6 / each['windows_per_s']:.0f}",
                f"{each['requests']:.0f}",
                f"{each['cpu_s']:.1f}",
                f"{each['peak_mib']:.0f}",
            )
            for name, each in rows
        ],
    )
    if num_big:
        print_table(("", ""), [(name, f"{value:.4g}") for name, value in results["large"].items()])
    return results


def _on_all_cores(base: Scenario, num_requests: int, progress: Progress) -> dict[str, float]:
    """Run the same swarm and load once on each core, each with its own seed and its share of the requests."""
    num_cores = multiprocessing.cpu_count()
    share = changed(base, {"workload.requests": max(1, num_requests // num_cores)})
    start_s = time.monotonic()
    (cell,) = sweep(share, [{}], num_cores, progress, num_cores)
    return {
        "requests": sum(report.num_requests for report in cell.reports),
        "windows": sum(report.num_windows for report in cell.reports),
        "cores": num_cores,
        "wall_s": time.monotonic() - start_s,
    }


def _measure(scenario: Scenario) -> dict[str, float]:
    start_s = time.process_time()
    report = summarise(run_scenario(scenario))
    cpu_s = time.process_time() - start_s
    return {
        "windows_per_s": report.num_windows / cpu_s,
        "windows": report.num_windows,
        "requests": report.num_requests,
        "simulated_s": report.duration_s,
        "cpu_s": cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
