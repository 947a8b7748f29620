"""What is damaged is refused in one sentence, or it writes what transformers writes with the same damage."""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from damage import damage
from demand import on_demand
from test_text import TOKENIZERS
from transformers import AutoModelForCausalLM

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import DsdError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Span

FAMILIES = ("llama", "qwen3-moe", "gpt2", "gemma3", "gpt-neox")
NUM_TOKENS = 6


def write(folder: Path) -> tuple[list[int], list[int]]:
    """Return a prompt and what two stages write after it."""
    source = find_model(str(folder), NoProgress())
    codec = TextCodec(folder)
    num_layers = read_shape(folder).num_layers
    cut = num_layers // 2
    stages = [open_span(source, Span(*bounds)) for bounds in ((0, cut), (cut, num_layers))]
    try:
        prompt = [token % 100 for token in codec.encode_chat([{"role": "user", "content": "hello"}])][:12]
    except DsdError:
        prompt = [5, 6, 7]
    tables, caches = [SlotTable(), SlotTable()], [stage.new_cache(40) for stage in stages]
    text, num_seen = list(prompt), 0
    while len(text) < len(prompt) + NUM_TOKENS:
        new = range(num_seen, len(text))
        forwards = [table.append(new, [None, *new[:-1]], new) for table in tables]
        hidden = stages[0].hidden(caches[0], forwards[0], text[num_seen:])
        (view,) = stages[1].views(caches[1], forwards[1], hidden, [len(new) - 1])
        num_seen = len(text)
        for table in tables:
            table.settle(num_seen - 1)
        text.append(view.argmax())
    codec.decode(text)
    return prompt, text[len(prompt) :]


def expected(folder: Path, prompt: list[int]) -> list[int]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], "transformers made weights up, we must not have loaded this"
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            text.append(int(model.eval()(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=on_demand) for part in range(1, 5))])
def test_five_hundred_damaged_models(tiny, tmp_path, part):
    sources = []
    for family in FAMILIES:
        (tmp_path / family).mkdir()
        for file in tiny(family).iterdir():
            (tmp_path / family / file.name).write_bytes(file.read_bytes())
        TOKENIZERS["byte-level"].save_pretrained(tmp_path / family)
        sources.append(tmp_path / family)
    outcomes = {"refused": 0, "same": 0}
    for seed in range(100 * part, 100 * part + 100):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            done = damage(folder, rng.choice(sources), rng)
            try:
                prompt, written = write(folder)
            except DsdError as exc:
                assert "\n" not in str(exc), (seed, done)
                assert len(str(exc)) < 400, (seed, done)
                outcomes["refused"] += 1
                continue
            assert written == expected(folder, prompt), (seed, done)
            outcomes["same"] += 1
    assert min(outcomes.values()) > 20, "some damage matters, some does not"
