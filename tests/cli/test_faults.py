"""What goes wrong around the command line: what failed leaves nothing behind, and everything is said in one sentence."""

import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from member_processes import DSD, dsd

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models import source
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from node.cli.commands import create as create_command
from node.cli.commands import doctor
from node.cli.main import main
from node.cli.table import COMMANDS, Command
from node.config import CreateConfig, GatewayConfig, NodeConfig, UpConfig, machine
from node.local.events import Ready
from node.member import measure
from node.member.model import find_member_model
from node.member.reachable import reachable_addresses
from node.member.state import SwarmState


def test_a_swarm_that_could_not_start_is_not_left_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    swarm = tmp_path / "swarm"
    failed = dsd("create", "--swarm", f"{swarm}/", "--model", "no/such-model", check=False)
    assert failed.returncode == 1
    assert "no/such-model: it is not in the cache" in failed.stderr
    assert not SwarmState(f"{swarm}/").is_member
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        failed = dsd("create", "--swarm", f"{swarm}/", "--model", tiny("llama"), "--listen", listen, check=False)
    assert failed.returncode == 1
    assert f"cannot listen on {listen}" in failed.stderr
    assert not SwarmState(f"{swarm}/").is_member


def test_a_relative_folder_becomes_absolute_and_another_machine_is_told_what_to_copy(tiny, tmp_path, monkeypatch):
    folder = tiny("llama")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(
        create_command,
        "serve_swarm",
        lambda _config, report, _gateway: report(Ready(address="x", span="x", weight_bytes=0)),
    )
    create_command.run(CreateConfig(swarm=f"{tmp_path}/a/", model=folder.name), GatewayConfig())
    stored = SwarmState(f"{tmp_path}/a/").membership()
    assert stored.model == str(folder)
    assert stored.digest == find_model(str(folder), NoProgress()).digest()

    def elsewhere(**fields):
        from msgspec.structs import replace

        return find_member_model(replace(stored, **fields), NoProgress())

    assert elsewhere().digest() == stored.digest
    with pytest.raises(
        ConfigError, match=f"copy it to this machine .* --model FOLDER; its digest is {stored.digest[:12]}"
    ):
        elsewhere(model="/not/on/this/machine")
    with pytest.raises(ModelError, match=f"another model here than in the swarm: .* the swarm's {stored.digest[:12]}"):
        elsewhere(model=str(tiny("llama-tied")))


def fail_with(monkeypatch, error):
    def run(_config: NodeConfig) -> int:
        raise error

    command = COMMANDS["node"]
    monkeypatch.setattr(Command, "load_run", lambda self: run if self is command else None)
    monkeypatch.setattr(Command, "load_settings", lambda _self: (NodeConfig,))
    return main(["node"])


def test_what_nobody_foresaw_is_a_sentence_and_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert fail_with(monkeypatch, ExceptionGroup("tasks", [KeyError("surprise")])) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "dsd node failed for a reason that nobody foresaw: KeyError: 'surprise'; please report it with " in said
    report = Path(re.search(r"with (\S+)$", said.strip()).group(1))
    assert report.is_relative_to(tmp_path)
    assert "Traceback" in report.read_text()


@pytest.mark.parametrize(
    "words", [("generate", "--stages", "1", "--max-tokens", "300", "--raw", "--prompt-ids", "5,6,7")]
)
def test_a_reader_that_leaves_ends_the_command_in_silence(tiny, words):
    """As `| head -c 20` does."""
    with subprocess.Popen(
        [*DSD, *words, "--model", str(tiny("llama")), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as process:
        process.stdout.close()
        children = []
        while process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True) or children
        assert "Traceback" not in process.stderr.read()
        assert "BrokenPipe" not in process.stderr.read()
        process.stderr.close()
    assert process.returncode == 141
    assert children, "there was a stage"
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_memory_and_cores_are_those_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    outside = machine.available_bytes()
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{600 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {100 << 20}\n")
    assert machine.available_bytes() == min(outside, 524 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes() > 524 << 20
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _pid: set(range(16)))
    assert machine.num_cores() == 16
    (tmp_path / "cpu.max").write_text("250000 100000")
    assert machine.num_cores() == 2
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "_num_others", lambda: 0)
    machine.auto_threads.cache_clear()
    (tmp_path / "cpu.max").write_text("max 100000")
    assert (UpConfig(stages=3).threads, NodeConfig().threads, NodeConfig(threads=2).threads) == (4, 16, 2)
    machine.auto_threads.cache_clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert NodeConfig().threads == 3
    machine.auto_threads.cache_clear()


def test_addresses_of_both_families_are_announced():
    found = reachable_addresses(("/ip6/::/tcp/4001/p2p/X", "/ip4/0.0.0.0/tcp/4001/p2p/X"), "")
    assert "/ip4/127.0.0.1/tcp/4001/p2p/X" in found
    assert not any("/ip6/::/" in address or "fe80" in address for address in found)


def test_memory_is_that_of_the_card_if_layers_go_there(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: 8 << 30)
    monkeypatch.setattr(measure, "check_device", lambda _device: None)
    monkeypatch.setattr(measure.torch.cuda, "mem_get_info", lambda _device: (3 << 30, 16 << 30))
    assert measure._free_bytes("cuda") == 3 << 30
    assert measure._free_bytes("cpu") == 8 << 30


def test_the_doctor_names_both_digests(tiny, tmp_path):
    digest = find_model(str(tiny("llama")), NoProgress()).digest()
    state = SwarmState(f"{tmp_path}/swarm/")
    stored = state.create(model=str(tiny("llama")), dtype="float32", digest="f" * 64)
    finding = doctor._model(stored)
    assert not finding.is_ok
    assert digest[:12] in finding.says
    assert "f" * 12 in finding.says


def test_two_who_pull_at_once_fetch_once(tmp_path, monkeypatch):
    fetched = []

    def fetch(model, folder, _progress):
        fetched.append(model.name)
        time.sleep(0.3)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{model.name}.gguf"
        file.write_bytes(b"x")
        return file

    monkeypatch.setattr(source, "fetch_gguf", fetch)
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda _: source.pull("smollm2-135m", NoProgress(), tmp_path), range(3)))
    assert fetched == ["smollm2-135m"]
    assert len(set(folders)) == 1


def test_a_stage_outside_a_swarm_stays_on_its_machine(capsys):
    assert main(["node", "--listen", "/ip4/0.0.0.0/tcp/4001"]) == 2
    assert "create a swarm with `dsd create`" in capsys.readouterr().err
