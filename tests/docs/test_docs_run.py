"""The commands of the documents, run. Changed is only what a test must: ports, folders, addresses, and for how long."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from member_processes import alive, running, status, wait_until
from test_docs import ROOT, commands
from upswarm import dsd_up

LEFT_OUT = {
    "dsd bench ring --links": "a minute",
    "dsd bench wan": "many minutes",
    "dsd calibrate": "1.6 GB of models and many minutes",
    "dsd sim sweep": "more than a minute; tests/cli/test_sim_commands.py sweeps a small scenario",
    "dsd sim compare": "tests/cli/test_sim_commands.py runs it",
    "dsd sim record": "minutes with a pair of models",
    "dsd quantize": "a minute; tests/models/test_smoothing.py quantizes a tiny model",
    "dsd up --model smollm2-int8": "needs what the command above writes",
    "dsd profile": "tests/cli/test_sim_commands.py profiles",
    "dsd create --model": "an address of a documentation network",
    "dsd node --swarm default --through": "an address of a documentation network",
}


def is_left_out(command):
    return any(command.startswith(start) for start in LEFT_OUT)


class Commands:
    """Runs the documents' commands."""

    def __init__(self, folder):
        self.folder = folder

    def changed(self, command, *more, **replaced):
        words = shlex.split(command)[1:]
        return [*(replaced.get(word, word) for word in words), *map(str, more)]

    def __call__(self, command, *more, timeout_s=90, codes=(0,), **replaced):
        line = [sys.executable, "-m", "node.cli", *self.changed(command, *more, **replaced)]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, cwd=self.folder
        )
        assert done.returncode in codes, (command, done.stderr[-2000:])
        return done.stdout or done.stderr


def blocks(page, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def run_python(code, **replaced):
    for old, new in replaced.items():
        code = code.replace(old, new)
    # As in asyncio's own prompt, where a block of ours can await.
    body = "\n".join(f"    {line}" for line in code.splitlines())
    program = f"import asyncio\nasync def main():\n{body}\nasyncio.run(main())\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def dsd(tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    return Commands(tmp_path)


def test_one_machine_and_its_clients(dsd, monkeypatch):
    flags = dsd.changed("dsd up --stages 3 --link 50ms", **{"50ms": "1ms"})[1:]
    with dsd_up(*flags) as up:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{up.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        assert "tokens/s" in dsd("dsd top", up.url, "--once")
        assert json.loads(dsd("dsd top --once --json", up.url))["peers"]
        dsd("dsd chat", up.url)
        dsd("dsd top --record run.jsonl", up.url, "--once")
        assert "tokens/s" in dsd("dsd top --replay run.jsonl --speed 10", "--once")
        assert "tokens/s" in dsd("dsd top mqtt://127.0.0.1:1883", "--once", **{"mqtt://127.0.0.1:1883": up.mqtt})
        asked = 'dsd generate --connect ADDRESS --prompt "Why is the sky blue?"'
        assert "sky" in dsd(asked, "--max-tokens", 24, ADDRESS=up.address)
        (openai,) = [block for block in blocks("docs/api.md", "python") if "OpenAI" in block]
        assert "CompletionUsage" in run_python(openai, **{"messages=": "max_tokens=24, messages="})
        (curl,) = [block for block in blocks("docs/api.md", "") if "curl" in block]
        curl = curl.replace("http://127.0.0.1:8484", up.url).replace('"stream"', '"max_tokens": 24, "stream"')
        told = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
        assert told.stdout.rstrip().endswith("data: [DONE]"), told.stderr
        for page in ("README.md", "docs/api.md"):
            (swarm,) = [block for block in blocks(page, "python") if "import Swarm" in block]
            address = {"/ip4/…/p2p/…": up.address, "max_tokens=64": "max_tokens=24"}
            assert len(run_python(swarm, **address)) > 20


def test_commands_that_need_nobody(dsd):
    few = ("--set", "workload.requests=6")
    assert "smollm2-135m" in dsd("dsd models list")
    alone = 'dsd generate --stages 2 --mode sync --depth 8 --json --prompt "..."'
    answer = dsd(alone, "--max-tokens", 16)
    assert json.loads(answer)["stats"]["decision"]["depth"] == 8
    (dsd.folder / "answer.json").write_text(answer)
    assert dsd("dsd verify answer.json").startswith("honest: 16 tokens")
    relaxed = json.loads(dsd('dsd generate --verify relaxed --budget 0.02 --json --prompt "..."', "--max-tokens", 32))
    assert relaxed["stats"]["verification"] == "relaxed"
    assert relaxed["stats"]["relaxed_nats"] <= 0.02 * len(relaxed["token_ids"])
    assert "tokens/s" in dsd("dsd sim run docs/scenarios/sharded.toml", *few)
    dsd("dsd sim run docs/scenarios/churn.toml --set churn.up=20s --csv requests.csv", *few)
    assert (dsd.folder / "requests.csv").read_text().count("\n") > 1
    dsd("dsd sim run docs/scenarios/sharded.toml --record sim.jsonl", *few)
    dsd("dsd sim trace docs/scenarios/sharded.toml --output trace.json", *few)
    assert json.loads((dsd.folder / "trace.json").read_text())["traceEvents"]


def test_two_machines(dsd):
    folder = dsd.folder
    a, b = (str(folder / name) for name in "ab")
    for name in (a, b):
        Path(name).mkdir()
    with running(*dsd.changed("dsd create", "--swarm", a), log=folder / "a.log"):
        invite = dsd("dsd invite", "--swarm", a).strip()
        dsd("dsd invite --uses 2 --expires 30d", "--swarm", a)
        joined = dsd.changed("dsd join dsd1…", "--swarm", b, **{"dsd1…": invite})
        with running(*joined, log=folder / "b.log") as second:
            wait_until(lambda: len(status(a).members) == 2 and not status(a).uncovered)
            asked = 'dsd generate --swarm default --prompt "Why is the sky blue?"'
            texts = {dsd(asked, "--max-tokens", 16, "--raw", default=swarm) for swarm in (a, b)}
            assert len(texts) == 1
            assert "serving" in dsd("dsd members", "--swarm", a)
            dsd("dsd plan", "--swarm", a)
            # 1: it has found something to say, such as a port that no other machine was seen to reach.
            assert "ports" in dsd("dsd doctor", "--swarm", a, codes=(0, 1))
            gone = status(b).peer
            dsd("dsd node stop", "--swarm", b)
            assert second.wait(timeout=30) == 0
            for again in ("dsd node --swarm default", "dsd node --swarm default --relay"):
                with running(*dsd.changed(again, default=b), log=folder / "b.log") as second:
                    wait_until(lambda: gone in alive(a))
                    dsd("dsd node stop", "--swarm", b)
                    assert second.wait(timeout=30) == 0
            assert gone[-6:] in dsd("dsd invites", "--swarm", a)
            dsd("dsd revoke PEER", "--swarm", a, PEER=gone[-10:])
            assert "new network key" in dsd("dsd rekey", "--swarm", a)


def test_every_command_of_the_documents_is_run_here():
    strings = (node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant))
    run = {text for text in strings if re.match(r"dsd \w", str(text))} - set(LEFT_OUT)
    documented = {command for _, command in commands()}
    assert {command for command in documented - run if not is_left_out(command)} == set()
    assert run <= documented, "what is run here stands there, word for word"
