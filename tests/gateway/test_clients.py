"""Clients that people use, unmodified, hold a conversation of ten turns with tool calls in its history.

The official client is always tried. The others are tried where `scripts/clients` has installed them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "clients"
INSTALLED = Path(os.environ.get("DSD_CLIENTS") or "/nowhere")
MODEL = "smollm2-135m"

pytestmark = pytest.mark.xdist_group("gateway")

CLIENTS = {
    "openai": [sys.executable, PROGRAMS / "openai_client.py"],
    "langchain": [INSTALLED / "python/bin/python", PROGRAMS / "langchain_client.py"],
    "litellm": [INSTALLED / "python/bin/python", PROGRAMS / "litellm_client.py"],
    "ai-sdk": ["node", INSTALLED / "javascript/ai_sdk_client.mjs"],
}


@pytest.mark.parametrize("client", CLIENTS)
def test_ten_turns_with_tools_in_the_history(up, client):
    program, script = map(str, CLIENTS[client])
    if not Path(script).exists() or not (program == "node" or Path(program).exists()):
        pytest.skip("run scripts/clients, which installs it")
    done = subprocess.run(
        [program, script, f"{up.url}/v1", MODEL], capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 10
    assert all(isinstance(answer, str) and answer for answer in answers)
