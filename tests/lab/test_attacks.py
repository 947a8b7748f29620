"""The attack suite itself: every twelfth attack against a live swarm, or all of them on demand."""

import json
import subprocess
import sys

import pytest
from demand import IS_ALL


@pytest.mark.timeout(900)
def test_attacks_are_held_and_the_honest_client_notices_nothing(smollm):
    command = [sys.executable, "-m", "node.lab.testnet", "attack", "--json", "--every", "1" if IS_ALL else "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    outcome = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, outcome
    assert outcome["attacks"] == outcome["held"] >= (40 if IS_ALL else 6)
    assert (outcome["honest_wrong"], outcome["honest_failed"], outcome["is_alive"]) == (0, [], True)
    assert outcome["sessions_left"] <= 1
    assert {"honest_ratio", "tokens_per_s", "resident_mib"} <= set(outcome)
