"""Runs scenarios for `dsd sim`: a single one, or a grid of changes on all cores."""

import csv
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.progress import Progress
from dsd_p2p.sim.agreement import Agreement, read_agreement
from dsd_p2p.sim.fleet import Fleet, FleetRun
from dsd_p2p.sim.policies import policy_maker
from dsd_p2p.sim.report import Report, summarise
from dsd_p2p.sim.scenario import Scenario
from dsd_p2p.sim.scenario_file import changed
from dsd_p2p.telemetry.watch import Sink
from node.lab.recorded import bundled_agreement

Change = dict[str, Any]


def run_scenario(
    scenario: Scenario,
    *,
    is_recording: bool = False,
    progress: Callable[[int, float], None] | None = None,
    tell: Sink | None = None,
) -> FleetRun:
    """Run one scenario to its end.

    tell: receives the events that a live swarm's telemetry would send.

    Raises:
        ConfigError: the scenario's agreement or the policy's weights cannot be read.
    """
    policy_of = policy_maker(scenario.speculation)
    return Fleet(scenario, policy_of, _trace(scenario), is_recording=is_recording, progress=progress, tell=tell).run()


def _trace(scenario: Scenario) -> Agreement | None:
    match scenario.acceptance.trace:
        case "":
            return None
        case "bundled":
            return read_agreement(bundled_agreement())
        case file:
            return read_agreement(Path(file))


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One point of a sweep: the changes to the scenario, and one report for each seed."""

    changes: dict[str, Any]
    reports: list[Report]
    seconds: float

    def spread(self, value: Callable[[Report], float]) -> tuple[float, float]:
        """Return the mean and standard deviation over the seeds."""
        values = [value(report) for report in self.reports]
        return mean(values), stdev(values) if len(values) > 1 else 0.0


def grid(texts: Sequence[str]) -> list[Change]:
    """Return the product of `NAME=VALUE,VALUE` texts, in their order.

    Raises:
        ConfigError: a text does not have that form.
    """
    axes = []
    for text in texts:
        name, separator, values = text.partition("=")
        axes.append([assignment(f"{name}{separator}{value}") for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def assignment(text: str) -> tuple[str, Any]:
    """Return the name and value of `NAME=VALUE`. A value that is valid JSON is read as JSON: `["sync"]` is a list.

    Raises:
        ConfigError: the text does not have that form.
    """
    name, separator, value = text.partition("=")
    if not separator or not value:
        raise ConfigError(f"{text!r}: write NAME=VALUE, or with --grid NAME=VALUE,VALUE, like speculation.depth=2,4,8")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


def sweep(
    scenario: Scenario,
    points: Sequence[Change],
    num_seeds: int,
    progress: Progress,
    num_processes: int = 0,
    ray_address: str = "",
) -> list[Cell]:
    """Run every point with seeds `scenario.seed`, +1, ... on all cores or on a Ray cluster; the results are the same.

    Raises:
        ConfigError: a change does not fit the scenario, or Ray is not installed.
    """
    jobs = [
        changed(scenario, {**point, "seed": scenario.seed + number}) for point in points for number in range(num_seeds)
    ]
    results: list[tuple[Report, float]] = []
    start_s = time.monotonic()
    for result in _everywhere(jobs, num_processes, ray_address):
        results.append(result)
        left_s = (time.monotonic() - start_s) / len(results) * (len(jobs) - len(results))
        progress.step(
            f"simulate (about {left_s:.0f} s left)" if len(results) == 1 else "simulate", len(results), len(jobs)
        )
    return [
        Cell(
            changes=point,
            reports=[report for report, _ in results[index * num_seeds : (index + 1) * num_seeds]],
            seconds=sum(seconds for _, seconds in results[index * num_seeds : (index + 1) * num_seeds]),
        )
        for index, point in enumerate(points)
    ]


def _everywhere(jobs: Sequence[Scenario], num_processes: int, ray_address: str) -> Iterator[tuple[Report, float]]:
    if ray_address:
        yield from _on_ray(jobs, ray_address)
        return
    count = num_processes or os.cpu_count() or 1
    if count == 1 or len(jobs) == 1:
        yield from map(_report, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(count, len(jobs))) as pool:
        yield from pool.imap(_report, jobs)


def _on_ray(jobs: Sequence[Scenario], address: str) -> Iterator[tuple[Report, float]]:
    try:
        import ray
    except ImportError as exc:
        raise ConfigError("--ray needs Ray on this machine and on the cluster: pip install 'dsd-p2p[ray]'") from exc
    ray.init(address=None if address == "local" else address, log_to_driver=False)
    try:
        task = ray.remote(_report)
        for pending in [task.remote(job) for job in jobs]:
            yield ray.get(pending)
    finally:
        ray.shutdown()


def _report(scenario: Scenario) -> tuple[Report, float]:
    start_s = time.process_time()
    return summarise(run_scenario(scenario)), time.process_time() - start_s


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV. The header is the keys of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def flat(report: Report) -> dict[str, object]:
    """Return the report's numbers as one flat row."""
    row: dict[str, object] = {}
    for name, value in msgspec.to_builtins(report).items():
        if isinstance(value, dict) and name.endswith("_s"):
            row |= {f"{name[:-2]}_{part}_s": each for part, each in value.items()}
        elif not isinstance(value, dict | list):
            row[name] = value
    return row


def draw(path: Path, cells: Sequence[Cell], axis: str) -> None:
    """Draw throughput and time per token against `axis`, one line for each combination of the other changes.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError("plots need matplotlib: pip install 'dsd-p2p[bench]'") from exc
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        others = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in cell.changes.items() if name != axis)
        lines.setdefault(others, []).append(cell)
    for label, of_line in lines.items():
        xs = [str(cell.changes[axis]) for cell in of_line]
        for axes, value in ((left, lambda r: r.requests_per_s), (right, lambda r: 1e3 * r.tpot_s.mean)):
            points = [cell.spread(value) for cell in of_line]
            axes.errorbar(
                xs, [m for m, _ in points], yerr=[s for _, s in points], marker="o", capsize=3, label=label or None
            )
    left.set(xlabel=axis, ylabel="requests a second")
    right.set(xlabel=axis, ylabel="time per output token, ms")
    if len(lines) > 1:
        right.legend(fontsize="small")
    figure.savefig(path)
