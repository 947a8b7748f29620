"""Implements `dsd sim`: simulate swarms in virtual time with the live protocol."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.sim.report import Report, chrome_trace, rows, summarise
from dsd_p2p.sim.scenario import Scenario
from dsd_p2p.sim.scenario_file import changed, read_scenario
from node.console import ConsoleProgress
from node.lab.config import RecordConfig, ScenarioFlags, SimCompareConfig, SimRunConfig, SimSweepConfig, SimTraceConfig
from node.lab.receipt import print_table
from node.lab.simulator.bundled import find_scenario
from node.lab.simulator.fit import Comparison, compare
from node.lab.simulator.simulation import Cell, assignment, draw, flat, grid, run_scenario, sweep, write_csv
from node.watch.outlets import recording


def run(config: SimRunConfig) -> int:
    """Simulate one scenario. With --json, the last line on standard output is one object."""
    scenario = _scenario(config)
    with ConsoleProgress() as progress, recording(config.record) as tell:
        total = scenario.workload.requests
        fleet_run = run_scenario(
            scenario,
            progress=lambda done, _now_s: progress.step("simulate", done, total),
            tell=tell if config.record else None,
        )
    report = summarise(fleet_run)
    if config.csv:
        write_csv(Path(config.csv), rows(fleet_run))
    _show(report)
    if config.json:
        print(msgspec.json.encode(report).decode(), flush=True)
    return 0


def trace(config: SimTraceConfig) -> int:
    """Write the timeline of a run."""
    fleet_run = run_scenario(_scenario(config), is_recording=True)
    output = Path(config.output)
    output.write_bytes(chrome_trace(fleet_run))
    print(output)
    return 0


def sweep_grid(config: SimSweepConfig) -> int:
    """Simulate every combination of changes. With --json, the last line on standard output is one object."""
    scenario, points = _scenario(config), grid(list(config.grid))
    with ConsoleProgress() as progress:
        cells = sweep(scenario, points, config.seeds, progress, num_processes=config.processes, ray_address=config.ray)
    if config.csv:
        table = [{**cell.changes, **flat(report)} for cell in cells for report in cell.reports]
        write_csv(Path(config.csv), table)
    if config.plot:
        draw(Path(config.plot), cells, next(iter(points[0])))
    _show_cells(cells)
    if config.json:
        print(msgspec.json.encode(cells).decode(), flush=True)
    return 0


def compare_receipts(config: SimCompareConfig) -> int:
    """Predict measured runs. With --json, the last line on standard output is one object."""
    comparisons = compare([path for name in config.receipts for path in _files(Path(name))])
    if config.held_out:
        comparisons = [each for each in comparisons if each.is_held_out]
    print_table(
        ("stages", "link", "window", "measured tokens/s", "predicted", "error", "TTFT error", ""),
        [
            (
                str(each.stages),
                each.link,
                each.arm,
                f"{each.measured:.2f}",
                f"{each.predicted:.2f}",
                f"{each.error:+.1%}",
                f"{each.ttft_error:+.1%}",
                "" if each.is_held_out else "fitted",
            )
            for each in comparisons
        ],
    )
    result = _errors(comparisons)
    print_table(
        ("", ""), [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in result.items()]
    )
    if config.json:
        print(msgspec.json.encode({**result, "cells": [asdict(each) for each in comparisons]}).decode(), flush=True)
    return 0


def record(config: RecordConfig) -> int:
    """Record how well one model guesses another."""
    from dsd_p2p.sim.agreement import write_agreement
    from node.lab.simulator.record import record_agreement

    with ConsoleProgress() as progress:
        agreement = record_agreement(config, progress)
    write_agreement(agreement, Path(config.output))
    print(config.output)
    return 0


def _errors(comparisons: Sequence[Comparison]) -> dict[str, float | int]:
    if not comparisons:
        raise ConfigError(
            "no held-out cells: the receipts have only the cell used for the fit; give more receipts or drop --held-out"
        )
    errors = [abs(each.error) for each in comparisons]
    ttft_errors = [abs(each.ttft_error) for each in comparisons]
    return {
        "median_error": median(errors),
        "worst_error": max(errors),
        "configurations": len(comparisons),
        "median_ttft_error": median(ttft_errors),
        "worst_ttft_error": max(ttft_errors),
    }


def _scenario(config: ScenarioFlags) -> Scenario:
    scenario = read_scenario(find_scenario(config.scenario))
    changes: dict[str, object] = dict(map(assignment, config.set))
    if config.seed is not None:
        changes["seed"] = config.seed
    return changed(scenario, changes) if changes else scenario


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def _show(report: Report) -> None:
    latencies = [
        (name, *(f"{1e3 * value:.1f}" for value in (each.mean, each.p50, each.p95, each.p99)))
        for name, each in (("TTFT", report.ttft_s), ("TPOT", report.tpot_s), ("end to end", report.total_s))
    ]
    print_table(("ms", "mean", "p50", "p95", "p99"), latencies)
    busiest = max(report.stages, key=lambda stage: stage["busy_share"], default={"busy_share": 0.0, "mean_queue": 0.0})
    print_table(
        ("", ""),
        [
            ("requests", f"{report.num_requests} in {report.duration_s:.1f} s, {report.num_failed} failed"),
            ("throughput", f"{report.requests_per_s:.2f} requests/s, {report.tokens_per_s:.1f} tokens/s"),
            ("within limits", f"{report.goodput_per_s:.2f} requests/s"),
            ("acceptance", f"{report.acceptance:.3f}, {report.mean_accepted_length:.2f} tokens per epoch"),
            (
                "windows",
                f"{report.num_windows}: "
                + ", ".join(f"{name} {count}" for name, count in list(report.windows.items())[:4]),
            ),
            ("busiest stage", f"{busiest['busy_share']:.0%} busy, {busiest['mean_queue']:.2f} windows waiting"),
            ("on links", f"{1e3 * report.network_s:.0f} ms a request; {report.stale_share:.1%} of the nodes stale"),
        ],
    )


def _show_cells(cells: Sequence[Cell]) -> None:
    def cell_text(cell: Cell) -> tuple[str, ...]:
        numbers = [
            cell.spread(value)
            for value in (
                lambda report: report.requests_per_s,
                lambda report: report.tokens_per_s,
                lambda report: 1e3 * report.tpot_s.mean,
                lambda report: 1e3 * report.ttft_s.mean,
            )
        ]
        changes = ", ".join(f"{name}={value}" for name, value in cell.changes.items())
        return (changes, *(f"{value:.2f} ± {deviation:.2f}" for value, deviation in numbers))

    print_table(("", "requests/s", "tokens/s", "TPOT ms", "TTFT ms"), [cell_text(cell) for cell in cells])
