"""Real processes that talk libp2p: the text, the command line, and what is left behind."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import reference
import trio
from demand import on_demand
from families import NUM_LAYERS, RECURRENT, VOCAB
from prompting import DECISIONS, prompt_of

from dsd_p2p.coordination.engine import GenerateOptions, open_engine
from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.drafting.shadow import make_shadow
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.transport.ephemeral import open_ephemeral
from dsd_p2p.types import Sampling, Span, TextRequest
from dsd_p2p.window.static import StaticPolicy
from node.config import UpConfig
from node.local.local_swarm import local_swarm, stage_processes

DSD = [sys.executable, "-m", "node.cli"]


async def write_all(config, num_layers, vocab_size, requests):
    """Run `requests` (drafter, decision, prompt, num_tokens, sampling) one after another over one swarm of processes."""
    spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
    answers = []
    with trio.fail_after(280):
        async with (
            local_swarm(stage_processes(config, spans), NoProgress()) as nodes,
            open_ephemeral(LinkModel()) as transport,
            open_engine(transport, NgramDrafter(), vocab_size) as (engine, stages),
        ):
            await stages.add([node.address for node in nodes])
            for drafter, decision, prompt, num_tokens, sampling in requests:
                engine.own_drafter.current = drafter
                options = GenerateOptions(text=TextRequest(max_tokens=num_tokens, sampling=sampling))
                async with engine.generate(prompt, options, StaticPolicy(decision)) as generation:
                    answers.append([token async for token in generation])
    return answers


PROMISED = ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3-moe", "gpt-neox", "gpt2"]
"""Every family with one, two and four stages is split in one process (tests/models/test_families.py)."""


@pytest.mark.parametrize(
    ("family", "num_stages"),
    [
        *((family, 2) for family in [*PROMISED, "qwen3-next"]),
        ("llama", 1),
        ("gemma3", 4),
        *(pytest.param(family, 4, marks=on_demand) for family in RECURRENT),
    ],
)
async def test_every_family_in_real_processes_writes_the_unsplit_models_text(tiny, family, num_stages):
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    drafters = [
        NgramDrafter(),
        CombinedDrafter(ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")),
        make_shadow(source, NUM_LAYERS),
    ]
    sampled = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=7)
    requests = []
    for index, drafter in enumerate(drafters):
        greedy = Sampling()
        requests += [(drafter, decision, prompt_of(17), 24, greedy) for decision in DECISIONS.values()]
        requests += [(drafter, DECISIONS["tree"], prompt_of(1), 1 + 6 * index, greedy)]
        requests += [(drafter, decision, prompt_of(9), 16, sampled) for decision in list(DECISIONS.values())[index:]]
    requests += [(drafters[2], DECISIONS["tree"], prompt_of(600), 5, Sampling())]
    requests += [(drafters[1], DECISIONS["tree"], prompt_of(3), 200, Sampling())]
    answers = await write_all(UpConfig(model=str(folder), stages=num_stages), NUM_LAYERS, VOCAB, requests)
    texts_of_seed = set()
    for (drafter, decision, prompt, num_tokens, sampling), answer in zip(requests, answers, strict=True):
        if sampling.is_greedy:
            assert answer == reference.greedy(folder, prompt, num_tokens), (drafter.name, decision.mode)
        else:
            texts_of_seed.add(tuple(answer))
    assert len(texts_of_seed) == 1


@pytest.mark.parametrize("num_stages", [1, 2, 4])
async def test_smollm2_in_real_processes_writes_the_unsplit_models_text(smollm, num_stages):
    text = random.Random(3).choices(range(20, 40_000), k=600)
    ngram, shadow = NgramDrafter(), make_shadow(smollm, 30)
    itself = ModelDrafter(open_span(smollm, Span(0, 30)), "itself")
    greedy = Sampling()
    requests = [(shadow, decision, text[:9], 24, greedy) for decision in DECISIONS.values()]
    requests += [(drafter, DECISIONS["tree"], text[:1], 1, greedy) for drafter in (ngram, shadow, itself)]
    requests += [(drafter, DECISIONS["sync"], text[:50], 24, greedy) for drafter in (ngram, itself)]
    if num_stages == 2:
        requests += [(shadow, DECISIONS["tree"], text[:1], 120, greedy), (shadow, DECISIONS["tree"], text, 20, greedy)]
        requests += [(ngram, DECISIONS["plain"], text, 8, greedy)]
    answers = await write_all(UpConfig(stages=num_stages, dtype="float32"), 30, 49152, requests)
    for (drafter, decision, prompt, num_tokens, _), answer in zip(requests, answers, strict=True):
        expected = reference.greedy(smollm.path, prompt, num_tokens)
        if 2 in expected:
            expected = expected[: expected.index(2) + 1]
            answer = answer[: len(expected)]
        assert answer == expected, (drafter.name, decision.mode, len(prompt))


# The command line


def dsd(*arguments, timeout_s=120, **options):
    return subprocess.run(
        [*DSD, *arguments], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, **options
    )


def ids(prompt):
    return ",".join(map(str, prompt))


@pytest.mark.parametrize("mode", ["plain", "continuous"])
def test_generate_prints_the_promised_json(smollm, mode):
    flags = f"--model smollm2-135m --stages 2 --mode {mode} --window static --dtype float32 --raw --max-tokens 20 --json".split()
    result = dsd("generate", *flags, "--prompt", "The capital of France is")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.folder)
    prompt = tokenizer("The capital of France is").input_ids
    assert answer["token_ids"] == reference.greedy(smollm.path, prompt, 20)
    assert answer["text"] == tokenizer.decode(answer["token_ids"], skip_special_tokens=True)
    stats = answer["stats"]
    for name in ("tokens_per_s", "ttft_s", "mean_accepted_length", "bytes_per_token"):
        assert stats[name] > 0
    assert len(stats["mean_stage_s"]) == 2
    if mode == "plain":
        assert stats["counts"]["num_misses"] == 19
    assert stats["verification"] == "exact"


def test_int8_writes_one_text_in_every_mode_and_split(smollm):
    """Over real processes: plain in one stage, and a learned policy in three."""
    question = ["--prompt", "Name three rivers of Europe.", "--max-tokens", "24", "--json", "--weights", "int8"]
    texts = []
    for flags in (
        "--stages 1 --mode plain",
        "--stages 3 --mode continuous --draft shadow+ngram",
    ):
        result = dsd("generate", "--model", "smollm2-135m", *flags.split(), *question)
        assert result.returncode == 0, result.stderr
        texts.append(json.loads(result.stdout.strip().splitlines()[-1])["token_ids"])
    assert len(texts[0]) == 24
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--dtype bfloat16", "--weights int8 computes in float32, not in bfloat16"),
        ("--model {gpt2}", "has no int8 form"),
    ],
)
def test_int8_that_cannot_be_is_refused_in_a_sentence(tiny, flags, says):
    given = flags.format(gpt2=tiny("gpt2")).split()
    result = dsd("generate", "--weights", "int8", "--prompt-ids", "1,2", "--stages", "1", *given)
    assert result.returncode != 0
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="namespaces need root and TUN")
def test_real_links_between_namespaces_carry_the_same_text_and_nothing_stays(tiny):
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    prompt = prompt_of(9)
    command = [*DSD, "generate", "--model", str(tiny("llama")), "--stages", "2", "--draft", "ngram", "--json"]
    command += ["--prompt-ids", ids(prompt), "--max-tokens", "12", "--netlab", "--link", "10ms"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(result.stdout)
    assert report["token_ids"] == reference.greedy(tiny("llama"), prompt, 12)
    assert report["stats"]["ttft_s"] > 0.03, "three links of 10 ms lie on the way of the first token"
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == before


def test_the_fake_ring_compares_every_arm():
    """Live processes and sockets on the bundled trace; a wrong token ends it with an error."""
    command = [*DSD, "bench", "ring", "--links", "3ms", "--stages", "2", "--stage-time", "1ms", "--draft-time", "1ms"]
    result = subprocess.run(
        [*command, "--max-tokens", "16", "--json"], capture_output=True, text=True, timeout=120, check=True
    )
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["ratios"]) == {"sync_chain", "sync_tree", "continuous_chain", "continuous_tree"}
    assert all(len(runs) == 3 for runs in report["runs"].values())
    for run in report["runs"]["continuous_tree"]:
        assert run["num_tokens"] == 16
        assert run["counts"]["hits_by_rank"]
        assert run["verification"] == "exact"


def test_models_path_prints_what_transformers_loads(smollm):
    result = dsd("models", "path", "smollm2-135m")
    assert Path(result.stdout.strip()) == smollm.path
    listing = dsd("models", "list")
    assert "smollm2-135m" in listing.stdout
    assert "Apache-2.0" in listing.stdout


@pytest.fixture
def broken_models(tiny, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny("llama"), encoder)
    (encoder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    no_weights = tmp_path / "no-weights"
    no_weights.mkdir()
    shutil.copy(tiny("llama") / "config.json", no_weights)
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny("llama"), truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return {"llama": tiny("llama"), "qwen": tiny("qwen2"), "encoder": encoder, "empty": no_weights, "cut": truncated}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate --model /no/such/folder --prompt x", "no model '/no/such/folder'"),
        ("generate --model no-such-model --prompt x", "no model 'no-such-model'"),
        ("generate --model {encoder} --prompt-ids 1", "is not a decoder language model"),
        ("generate --model {empty} --prompt-ids 1", "has no model.safetensors"),
        ("generate --model {cut} --prompt-ids 1", "fetch them again"),
        ("generate --model {llama} --prompt x", "no tokenizer: give the prompt with --prompt-ids"),
        ("generate --model {llama} --prompt-ids 1,x", "token ids separated by commas"),
        ("generate --model {llama} --prompt-ids 999", "outside the model's vocabulary of 131"),
        ("generate --model {llama} --stages 9 --prompt-ids 1", "stages: expected 1 to 4"),
        ("generate --model {llama} --stages 1 --max-tokens 1024 --prompt-ids 1", "exceed the model's context of 1024"),
        ("generate --model {llama} --stages 1 --cache-memory 1kb --prompt-ids 1", "raise --cache-memory"),
        ("generate --model {llama} --stages 1 --dtype float8 --prompt-ids 1", "choose one of float32"),
        (
            "generate --model {llama} --stages 1 --draft smollm2-135m --prompt-ids 1",
            "choose a drafter with the target's tokenizer",
        ),
        ("generate --prompt x --link 50parsec", "expected a number and one of s, ms, us"),
        ("generate", "no prompt: give --prompt TEXT"),
        ("generate --prompt x --config /no/such.toml", "config file /no/such.toml"),
        ("generate --model {llama} --connect /ip4/127.0.0.1/tcp/9 --prompt-ids 1", "/p2p/PEER"),
        ("node --model {llama} --span 2:9", "outside the model's layers [0, 4)"),
        ("node --model {llama} --span 3:1", "FIRST below LAST"),
        ("node --model {llama} --listen /ip4/127.0.0.1/tcp/{port}", "choose another with --listen"),
        ("models pull nothing", "no model 'nothing'"),
        ("models pull", "needs a model"),
    ],
)
def test_an_error_is_one_clear_line_and_nothing_stays(broken_models, command, words):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = command.format(port=taken.getsockname()[1], **broken_models).split()
        mark = uuid.uuid4().hex
        result = dsd(*arguments, env={**os.environ, "DSD_TEST_MARK": mark})
    assert result.returncode not in (0, -signal.SIGKILL), result.stdout
    message = result.stderr.strip().splitlines()[-1]
    assert words in message, result.stderr
    assert message.startswith("dsd ")
    assert "Traceback" not in result.stderr
    assert processes_with(mark) == []


def test_an_unknown_key_in_a_config_file_is_an_error(tmp_path):
    file = tmp_path / "dsd.toml"
    file.write_text('prompt = "x"\nstagez = 3\n')
    result = dsd("generate", "--config", str(file))
    assert result.returncode != 0
    assert "stagez" in result.stderr


def test_stages_of_different_weights_are_refused(tiny):
    """Two nodes over the same layers' shapes and other weights: their keys differ, and nothing is generated."""
    folders = [tiny("llama"), tiny("llama-tied")]
    nodes = [
        subprocess.Popen(
            [*DSD, "node", "--model", str(folder), "--span", span, "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for folder, span in zip(folders, ("0:2", "2:4"), strict=True)
    ]
    try:
        addresses = [node.stdout.readline().strip() for node in nodes]
        result = dsd("generate", "--model", str(folders[0]), "--connect", ",".join(addresses), "--prompt-ids", "1,2")
        assert result.returncode != 0
        assert "serve different models" in result.stderr
    finally:
        for node in nodes:
            node.stdin.close()
        codes = [node.wait(20) for node in nodes]
        for node in nodes:
            node.stdout.close()
    assert codes == [0, 0]


def processes_with(mark):
    """Pids of living processes that were started with this mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdecimal() and f"DSD_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes()
            if is_ours and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_gone(mark, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def start_generate(tiny, mark, *flags):
    command = [*DSD, "generate", "--model", str(tiny("llama")), "--stages", "2", "--prompt-ids", "1,2,3", *flags]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "DSD_TEST_MARK": mark},
    )


@pytest.mark.parametrize(
    ("how", "moment_s"),
    [*((signal.SIGINT, s) for s in (0.5, 1.0, 3.0, 5.0, 8.0)), (signal.SIGTERM, 4.0), (signal.SIGKILL, 4.0)],
)
def test_a_signal_at_any_moment_leaves_no_process_behind(tiny, moment_s, how):
    tiny("llama")
    mark = uuid.uuid4().hex
    process = start_generate(tiny, mark, "--max-tokens", "1000", "--link", "20ms", "--mode", "plain")
    try:
        time.sleep(moment_s)
        process.send_signal(how)
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert wait_gone(mark) == []


def test_a_killed_stage_ends_the_answer_with_a_typed_error(tiny):
    mark = uuid.uuid4().hex
    process = start_generate(tiny, mark, "--max-tokens", "1000", "--link", "20ms", "--mode", "plain", "--json")
    try:
        deadline = time.monotonic() + 60
        while len(sockets := established(processes_with(mark))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        victim = next(pid for pid in processes_with(mark) if pid != process.pid and pid in sockets)
        time.sleep(1)
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1
    message = errors.decode().strip().splitlines()[-1]
    assert message.startswith("dsd generate: ")
    assert "Traceback" not in errors.decode()
    assert wait_gone(mark) == []


def established(pids):
    """Those of `pids` that hold an established TCP connection."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    holders = set()
    for pid in pids:
        try:
            if any(str(fd.readlink()) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir()):
                holders.add(pid)
        except OSError:
            continue
    return holders


def test_up_serves_whoever_knows_one_address(tiny):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*DSD, "up", "--model", str(tiny("qwen3")), "--stages", "2", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "DSD_TEST_MARK": mark},
    )
    try:
        line: list[str] = []
        while "--connect" not in line:
            text = process.stdout.readline()
            assert text, "it ended"
            line = text.split()
        address = line[line.index("--connect") + 1]
        flags = ["--model", str(tiny("qwen3")), "--connect", address, "--max-tokens", "15", "--json"]
        for mode in ("plain", "continuous"):
            result = dsd("generate", *flags, "--prompt-ids", ids(prompt_of(8)), "--mode", mode)
            assert result.returncode == 0, result.stderr
            assert json.loads(result.stdout.splitlines()[-1])["token_ids"] == reference.greedy(
                tiny("qwen3"), prompt_of(8), 15
            )
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert wait_gone(mark) == []
