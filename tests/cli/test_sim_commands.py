"""`dsd sim` and `dsd profile` as a user runs them: what they print, what they write, what they say of mistakes."""

import csv
import json
import multiprocessing
import tomllib
from pathlib import Path

import pytest

from dsd_p2p.models.progress import NoProgress
from dsd_p2p.sim.scenario_file import parse_scenario, read_scenario
from node.cli.main import main
from node.lab.benches.simulator import _on_all_cores

SMALL = ["--set", "workload.requests=12", "--set", "drafters.count=4"]
SCENARIO = "docs/scenarios/churn.toml"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_run_prints_a_summary_and_writes_a_row_a_request(tmp_path, capsys):
    table = tmp_path / "requests.csv"
    assert main(["sim", "run", SCENARIO, *SMALL, "--seed", "5", "--csv", str(table), "--json"]) == 0
    report = last_line(capsys)
    assert report["num_requests"] == 12
    assert report["num_leaked"] == 0
    assert {"ttft_s", "tpot_s", "total_s", "acceptance", "windows", "stages"} <= set(report)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["request"]) for row in rows] == list(range(12))
    assert sum(int(row["tokens"]) for row in rows) == pytest.approx(
        report["tokens_per_s"] * 12 / report["requests_per_s"]
    )


def test_a_timeline_has_passes_and_requests(tmp_path):
    output = tmp_path / "trace.json"
    assert main(["sim", "trace", SCENARIO, *SMALL, "--output", str(output)]) == 0
    events = json.loads(output.read_bytes())["traceEvents"]
    passes = [event for event in events if event["ph"] == "X" and "nodes" in event["args"]]
    assert len(passes) > 50
    assert all(event["dur"] > 0 for event in passes)
    assert sum(event["name"].startswith("request ") for event in events if event["ph"] == "X") == 12


def test_a_sweep_is_a_grid_with_seeds(tmp_path, capsys):
    table = tmp_path / "sweep.csv"
    grid = ["--grid", "speculation.window=plain,awc", "--grid", "links.wan.latency=1ms,40ms"]
    assert main(["sim", "sweep", SCENARIO, *SMALL, *grid, "--seeds", "2", "--csv", str(table), "--json"]) == 0
    cells = last_line(capsys)
    assert [cell["changes"]["speculation.window"] for cell in cells] == ["plain", "plain", "awc", "awc"]
    assert all(len(cell["reports"]) == 2 for cell in cells)
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == 8


def test_predictions_of_held_out_runs_are_close(capsys):
    """Everything here is deterministic: the receipts are files, the simulator is seeded."""
    assert main(["sim", "compare", "docs/benchmarks", "--held-out", "--json"]) == 0
    result = last_line(capsys)
    assert result["configurations"] >= 12
    assert result["median_error"] <= 0.10
    assert result["worst_error"] <= 0.20
    assert result["median_ttft_error"] <= 0.10
    assert all(cell["is_held_out"] for cell in result["cells"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no/such.toml"], "no scenario"),
        (["run", "dsd_p2p/data/policy.npz"], "must be a TOML file"),
        (["run", SCENARIO, "--set", "workload.requests=0"], "workload.requests"),
        (["run", SCENARIO, "--set", "nonsense"], "NAME=VALUE"),
        (["sweep", SCENARIO, "--grid", "speculation.depths=1,2"], "depths"),
        (["compare", "docs/scenarios"], "no receipt"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(["sim", *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert words in errors[-1]
    assert len(errors) == 1


def test_a_profile_is_lines_of_a_scenario(tiny, capsys):
    assert main(["profile", "--model", str(tiny("llama")), "--stages", "2"]) == 0
    text = capsys.readouterr().out
    table = tomllib.loads(text)["targets"][0]
    assert table["stages"] == 2
    assert [count for count, _ in table["stage"]["points"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    scenario = Path(SCENARIO).read_text()
    start = scenario.index("[[targets]]")
    parse_scenario(scenario[:start] + text + scenario[scenario.index("[workload]") :], "profiled.toml")


def test_a_large_run_is_parted_over_the_cores(monkeypatch):
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 2)
    result = _on_all_cores(read_scenario(Path(SCENARIO)), 41, NoProgress())
    assert (result["requests"], result["cores"]) == (40, 2)
    assert result["windows"] > 40
