"""The testnet itself: a quarter of a minute of chaos on a small one, as scripts run it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_little_chaos_ends_well_and_leaves_nothing_behind(smollm):
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    sizes = ["--nodes", "4", "--max-layers", "18", "--clients", "1", "--tokens", "16", "--seed", "3"]
    command = [sys.executable, "-m", "node.lab.testnet", "chaos", "--minutes", "0.25", *sizes, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.strip().splitlines()[-1])
    assert outcome["answers"] > 0
    assert outcome["tokens"] > 0
    assert (outcome["wrong"], outcome["hung"], outcome["leaked"]) == (0, 0, 0)
    assert outcome["failed_while_covered"] == []
    assert set(outcome["pauses"]) == {"count", "median_s", "p90_s", "max_s", "resumed"}
    assert sum(outcome["events"].values()) > 0
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == before
