"""Finished answers, judged by whoever has the weights: honest ones pass in every format, others do not."""

import json
import subprocess

import msgspec
import pytest
import reference
from families import NUM_LAYERS
from member_processes import DSD
from prompting import DECISIONS
from swarms import load_stages, model_swarm

from dsd_p2p.coordination.verify import judge_answer
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import ConfigError, DsdError
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Relaxation, Sampling, Span, TextRequest
from node.lab.audited.lies import changed_copies

PROMPT = [5, 9, 2, 77, 31]
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(temperature=1.2, top_p=0.8, top_k=20, seed=9)]
IDS = ["greedy", "sampled", "cut"]


def judged(source, sampling, tokens, dtype="float32", prompt=PROMPT):
    model = open_span(source, Span(0, NUM_LAYERS), dtype=dtype)
    text = TextRequest(max_tokens=len(tokens), sampling=sampling)
    return judge_answer(model, source.key(dtype), NUM_LAYERS, text, prompt, tokens)


async def written(source, sampling, dtype="float32", num_tokens=40):
    async with model_swarm(load_stages(source, 2, dtype=dtype), NgramDrafter()) as swarm:
        tokens, _ = await swarm.write(PROMPT, num_tokens, DECISIONS["chain"], sampling=sampling)
    return tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_an_answer_is_what_its_model_writes(tiny, dtype, sampling):
    source = find_model(str(tiny("llama")), NoProgress())
    tokens = await written(source, sampling, dtype)
    found = judged(source, sampling, tokens, dtype)
    assert found.is_honest, found
    for position in (0, 17, 39):
        changed = [*tokens[:position], (tokens[position] + 1) % 100, *tokens[position + 1 :]]
        found = judged(source, sampling, changed, dtype)
        assert not found.is_honest, (position, found)
        assert found.first_other is not None
        assert found.first_other <= position
        assert found.probability < 1e-3


async def test_another_seed_prompt_or_model_is_not_it(tiny):
    source = find_model(str(tiny("llama")), NoProgress())
    tokens = await written(source, SAMPLINGS[1])
    assert not judged(source, Sampling(temperature=0.8, seed=4), tokens).is_honest
    assert not judged(source, SAMPLINGS[1], tokens, prompt=[*PROMPT[:-1], 30]).is_honest
    with changed_copies(source) as copies:
        assert not judged(copies["4"], SAMPLINGS[1], tokens).is_honest
        assert not judged(copies["other"], SAMPLINGS[1], tokens).is_honest


def test_what_cannot_be_judged_is_said(tiny):
    source = find_model(str(tiny("llama")), NoProgress())
    model = open_span(source, Span(0, NUM_LAYERS))
    with pytest.raises(ConfigError, match="relaxed"):
        judge_answer(
            model, source.key("float32"), NUM_LAYERS, TextRequest(max_tokens=4, relaxation=Relaxation()), PROMPT, [1, 2]
        )
    with pytest.raises(ConfigError, match="expected 1 to 4096"):
        judged(source, Sampling(), [])
    with pytest.raises(DsdError):
        judged(source, Sampling(), [3, 1_000_000, 4])


def test_the_command_judges_a_file(tiny, tmp_path):
    folder = tiny("llama")
    source = find_model(str(folder), NoProgress())
    tokens = reference.greedy(folder, PROMPT, 8)
    asked = {
        "model": str(folder),
        "key": msgspec.to_builtins(source.key("float32")),
        "prompt_ids": PROMPT,
        "text": msgspec.to_builtins(TextRequest(max_tokens=8)),
    }
    for said, code in ((tokens, 0), ([*tokens[:3], tokens[3] + 1, *tokens[4:]], 1)):
        file = tmp_path / "answer.json"
        file.write_text(json.dumps({"text": "", "token_ids": said, "asked": asked, "stats": {}}))
        done = subprocess.run([*DSD, "verify", str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.startswith("honest")) == (code, code == 0), done.stderr
    file.write_text("{}")
    done = subprocess.run([*DSD, "verify", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, "dsd generate --json" in done.stderr) == (2, True)
