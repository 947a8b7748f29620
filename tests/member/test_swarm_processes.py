"""A swarm as people run it: real commands, processes and sockets on loopback."""

import json
import re
import signal
import subprocess
import time

import httpx
import pytest
import reference
from families import NUM_LAYERS
from member_processes import SERVE, alive, dsd, running, status, wait_until
from msgspec.structs import replace
from prompting import prompt_of

from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.grants import issue
from dsd_p2p.swarm.invite import parse_invite
from dsd_p2p.wire.membership import Role

NUM_TOKENS = 24


def folders(tmp_path, *names):
    return [f"{tmp_path}/{name}/" for name in names]


def test_from_an_invite_to_an_answer_and_back_out(tiny, tmp_path):
    a, b, c = folders(tmp_path, "a", "b", "c")
    model = str(tiny("llama"))
    prompt = prompt_of(9)
    expected = reference.greedy(tiny("llama"), prompt, NUM_TOKENS)
    ask = ["--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", NUM_TOKENS, "--draft", "ngram", "--json"]
    with running("create", "--swarm", a, "--model", model, "--max-layers", 2, log=tmp_path / "a.log"):
        invite = dsd("invite", "--swarm", a).stdout.strip()
        with running("join", invite, "--swarm", b, "--max-layers", 3, log=tmp_path / "b.log") as second:
            wait_until(lambda: len(alive(a)) == 2)
            spans = sorted(member.span for member in status(a).members)
            assert spans == ["[0, 2)", f"[1, {NUM_LAYERS})"], "the second closes the gap"
            for swarm in (a, b):
                answer = json.loads(dsd("generate", "--swarm", swarm, *ask).stdout)
                assert answer["token_ids"] == expected
            audited = dsd("generate", "--swarm", a, "--audit", *ask, check=False)
            assert (audited.returncode, "an audit needs a second peer" in audited.stderr) == (1, True)
            plan = json.loads(dsd("plan", "--swarm", a, "--json").stdout)
            assert plan["window"] == "plain" or plan["window"].startswith(("continuous ", "sync ")), plan["window"]
            layers = [span for stage in plan["plan"]["stages"] for span in range(*stage["span"])]
            assert layers == list(range(NUM_LAYERS))

            # A client's invite lets commands in, not stages.
            client = dsd("invite", "--swarm", a, "--role", "client").stdout.strip()
            assert "client" in dsd("join", client, "--swarm", c).stdout
            assert json.loads(dsd("generate", "--swarm", c, *ask).stdout)["token_ids"] == expected

            doctor = dsd("doctor", "--swarm", b, "--json", check=False)
            findings = {finding["what"]: finding for finding in json.loads(doctor.stdout)}
            assert all(finding["is_ok"] for name, finding in findings.items() if name != "ports"), doctor.stdout
            assert sum(name.startswith("…") for name in findings) == 2

            # A drained node has said goodbye before anybody could miss it.
            dsd("node", "stop", "--swarm", b)
            assert second.wait(timeout=20) == 0
            assert len(alive(a)) == 1
            assert status(a).uncovered == [2, 3]
        failed = dsd("generate", "--swarm", a, *ask, check=False, timeout_s=120)
        assert failed.returncode == 1
        assert "[2, 4)" in failed.stderr
        with running("node", "--swarm", b, "--max-layers", 3, log=tmp_path / "b2.log"):
            wait_until(lambda: len(alive(a)) == 2)
            assert json.loads(dsd("generate", "--swarm", a, *ask).stdout)["token_ids"] == expected
            assert len([m for m in status(a).members if m.span]) == 2, "restarted, not counted twice"


def test_any_peer_can_be_the_gateway_and_the_best_coordinator_writes(tmp_path):
    """The second node does not coordinate: it hands requests on, over the swarm, and a text is the same through either."""
    a, b = folders(tmp_path, "a", "b")
    asked = {
        "model": "smollm2-135m",
        "prompt": "The quick brown fox",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
    }

    def ask(url: str) -> dict:
        reply = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def gateway_url(process: subprocess.Popen) -> str:
        while not (found := re.search(r"chat at (http://[^/]+)/", line := process.stdout.readline())):
            assert line, "the node ended"
        return found.group(1)

    with running("create", "--swarm", a, "--port", 0, log=tmp_path / "a.log") as first:
        own = gateway_url(first)
        invite = dsd("invite", "--swarm", a).stdout.strip()
        with running("join", invite, "--swarm", b, "--draft", "none", "--port", 0, log=tmp_path / "b.log") as second:
            other = gateway_url(second)
            wait_until(lambda: httpx.get(f"{other}/readyz").status_code == 200)
            here, there = ask(own), ask(other)
            assert here["choices"] == there["choices"]
            assert here["usage"]["speculation"][0]["coordinator"] == ""
            assert there["usage"]["speculation"][0]["coordinator"] == status(a).peer
            peers = httpx.get(f"{other}/v1/status").json()["peers"]
            assert {peer["peer"] for peer in peers} == alive(a)
            # A smaller drafter for the whole swarm; the text stays.
            dsd("draft", "ngram", "--swarm", a)
            wait_until(lambda: {member.drafter for member in status(a).members} == {"ngram", ""})
            assert ask(own)["choices"][0]["text"] == here["choices"][0]["text"]
            assert status(a).draft == "ngram"
            assert dsd("draft", "none", "--swarm", a, check=False).returncode != 0
            with pytest.raises(AssertionError, match="owner can do this"):
                dsd("draft", "auto", "--swarm", b)
            assert "drafter: ngram" in dsd("plan", "--swarm", b).stdout
        refused = httpx.get(f"{own}/v1/models", headers={"Host": "evil.example"})
        assert refused.status_code == 400


def test_who_is_not_wanted_gets_a_clear_word_and_nothing_else(tiny, tmp_path):
    a, b, c, d = folders(tmp_path, "a", "b", "c", "d")
    log = tmp_path / "a.log"
    with running("create", "--swarm", a, "--model", str(tiny("llama")), log=log):
        invite = parse_invite(dsd("invite", "--swarm", a).stdout)
        other = SigningKey(b"x" * 32)
        forged = replace(
            invite,
            seed=b"y" * 32,
            grants=(issue(other, SigningKey(b"y" * 32).public, role=Role.STAGE, expires_at_s=2**33, max_uses=9),),
        )
        cases = {
            "forged": (forged, "one of this swarm|the previous grant"),
            "stretched": (replace(invite, grants=(replace(invite.grants[0], expires_at_s=2**34),)), "signature"),
            "other network key": (replace(invite, network_key=bytes(32)), "network key"),
        }
        for name, (bad, words) in cases.items():
            result = dsd("join", str(bad), "--swarm", f"{tmp_path}/{name.replace(' ', '-')}/", *SERVE, check=False)
            assert result.returncode != 0, name
            assert re.search(words, result.stderr), (name, result.stderr)
            assert "Traceback" not in result.stderr
        expired = dsd("invite", "--swarm", a, "--expires", "1s").stdout.strip()
        time.sleep(1.2)
        result = dsd("join", expired, "--swarm", b, *SERVE, check=False)
        assert result.returncode != 0
        assert "expired" in result.stderr
        for broken in ("dsd1nonsense", "hello", str(invite)[:-3]):
            result = dsd("join", broken, "--swarm", c, *SERVE, check=False)
            assert result.returncode == 2
            assert len(result.stderr.strip().splitlines()) == 1
        assert len(alive(a)) == 1
        # One use: the first is in, the second is told.
        with running("join", invite, "--swarm", c, log=tmp_path / "c.log"):
            wait_until(lambda: len(alive(a)) == 2)
            result = dsd("join", invite, "--swarm", d, *SERVE, check=False)
            assert result.returncode != 0
            assert "used by 1 others" in result.stderr
            # Thrown out: gone at once, and it may not come back.
            (victim,) = alive(a) - {status(a).peer}
            (issued, expired_one) = json.loads(dsd("invites", "--swarm", a, "--json").stdout)
            assert (issued["uses"], issued["max_uses"], issued["is_revoked"]) == ([victim], 1, False)
            assert expired_one["uses"] == []
            said = dsd("revoke", victim[-10:], "--swarm", a).stdout
            assert f"the invite …{issued['id'][-6:]} is revoked" in said
            wait_until(lambda: len(alive(a)) == 1)
        again = dsd("node", "--swarm", c, *SERVE, check=False)
        assert again.returncode != 0
        assert "revoked" in again.stderr
        lines = log.read_text().splitlines()
        # Dropped while it was connected, or refused when it came back: whichever was first.
        assert any("revoked" in line and ("peer dropped" in line or "member gone" in line) for line in lines)
        assert any("used by" in line and "peer dropped" in line for line in lines)


def test_a_second_node_of_the_same_swarm_on_a_machine_is_refused(tiny, tmp_path):
    (a,) = folders(tmp_path, "a")
    with running("create", "--swarm", a, "--model", str(tiny("llama")), log=tmp_path / "a.log") as first:
        result = dsd("node", "--swarm", a, *SERVE, check=False)
        assert result.returncode != 0
        assert "dsd node stop" in result.stderr
        again = dsd("create", "--swarm", a, *SERVE, check=False)
        assert again.returncode == 2
        assert "already" in again.stderr
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=20) == 0
    result = dsd("members", "--swarm", a, check=False)
    assert result.returncode == 2
    assert "start it with" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["members", "--swarm", "nowhere"], "no node daemon of this swarm"),
        (["invite", "--swarm", "nowhere"], "dsd create"),
        (["generate", "--swarm", "nowhere", "--prompt", "x"], "dsd create"),
        (["generate", "--audit", "--prompt", "x"], "--swarm"),
        (["join", "dsd1"], "damaged"),
        (["up", "--mqtt", "http://x"], "mqtt://HOST:PORT"),
        (["up", "--mqtt", "mqtts://x", "--mqtt-ca", "nowhere"], "no such file"),
        (["up", "--host", "192.0.2.1"], "--api-keys"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = dsd(*arguments, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
