"""Families are exact or refused before their weights are read, and what is refused says why."""

import re
from pathlib import Path

import pytest
import reference
import torch
from families import VOCAB
from prompting import DECISIONS, prompt_of
from swarms import load_stages, model_swarm
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaAttention

from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import ModelError
from dsd_p2p.models import families, shrink
from dsd_p2p.models.architecture import read_shape, shape_of
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span
from node.lab.families import FamilyStatus, all_families, sample_config, try_families, with_table

ROOT = Path(__file__).parent.parent.parent

CERTIFIED = (
    "afmoe",
    "bailing_hybrid",
    "bamba",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "ernie4_5",
    "falcon",
    "gemma4_text",
    "glm4_moe_lite",
    "gpt_neo",
    "gpt_oss",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "jetmoe",
    "lfm2_moe",
    "lfm3",
    "minicpm3",
    "minimax_m2",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo_hybrid",
    "phi3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "smollm3",
)
"""Beside those of tests/models/test_families.py."""


@pytest.fixture
def forgetful(tmp_path, monkeypatch):
    """Trials that nobody remembers."""
    monkeypatch.setattr(families, "default_cache_dir", lambda: tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("family", CERTIFIED)
async def test_two_stages_write_the_whole_models_text_in_all_modes(family, tmp_path):
    config = shrink.shrink(sample_config(family))
    config.eos_token_id = None
    torch.manual_seed(0)
    families.random_model(config).save_pretrained(tmp_path)
    source = find_model(str(tmp_path), NoProgress())
    prompt = prompt_of(23)
    expected = reference.greedy(tmp_path, prompt, 16)
    stages = load_stages(source, 2)
    itself = ModelDrafter(open_span(source, Span(0, read_shape(tmp_path).num_layers)), "itself")
    async with model_swarm(stages, itself) as swarm:
        for name, decision in DECISIONS.items():
            tokens, _ = await swarm.write(prompt, 16, decision)
            assert tokens == expected, name


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "no max_position_embeddings"),
        ("opt", "unusual order"),
        ("bart", "encoder-decoder"),
        ("mamba", "no max_position_embeddings"),
        ("qwen4_exp", "attention of kind indexed_attention is not supported"),
        ("gemma3n_text", "share keys and values"),
        ("moshi", "do not compute what the whole model does"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_familys_name(family, reason):
    ((name, found),) = try_families([family])
    assert (name, found.status) == (family, FamilyStatus.REFUSED)
    assert family.partition("_")[0] in found.reason
    assert reason in found.reason
    assert "\n" not in found.reason


def test_a_layer_that_attends_to_something_else_in_pieces_is_refused(forgetful, monkeypatch):
    """Its attention looks at the number of new rows, which the whole model and a window do not share."""
    forward = LlamaAttention.forward

    def odd(self, hidden_states, *args, **kwargs):
        output, weights = forward(self, hidden_states, *args, **kwargs)
        return output * (1 + hidden_states.shape[1] / 100), weights

    config = LlamaConfig(num_hidden_layers=2)
    assert families.pass_order(config) == "together"
    monkeypatch.setattr(LlamaAttention, "forward", odd)
    assert families.pass_order(config) == "together", "it is remembered"
    with pytest.raises(ModelError, match="llama: this model family is not supported, because its split layers"):
        families.pass_order(LlamaConfig(num_hidden_layers=2, rope_theta=5000.0))


def test_what_a_trial_raises_is_a_refusal(forgetful, monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ModelError, match=r"llama: this model family is not supported \(ZeroDivisionError"):
        families.pass_order(LlamaConfig(num_hidden_layers=2))


def test_a_trial_leaves_torchs_randomness_alone(forgetful):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    families.pass_order(LlamaConfig(num_hidden_layers=2))
    assert torch.equal(torch.rand(3), expected)


def test_caches_count_what_is_stored(tmp_path):
    """DeepSeek stores a latent and a rotated part; Gemma 4's layers differ in heads and head size."""
    shape = shape_of(sample_config("deepseek_v3"))
    assert {layer.kv_values for layer in shape.layers} == {512 + 64}
    layers = shape_of(sample_config("gemma4_text")).layers
    assert {(layer.kind, layer.kv_values) for layer in layers} == {
        ("sliding_attention", 2 * 4 * 256),
        ("full_attention", 2 * 4 * 512),
    }


def test_rope_that_depends_on_the_length_is_exact_up_to_its_original_limit(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert read_shape(tmp_path).max_positions == 64
    assert families.pass_order(config) == "together"


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight_scale_inv", "lm_head.weight_scale"])
def test_a_tensor_that_the_model_has_no_place_for_is_an_error(tiny, tmp_path, name):
    """The scale of a quantised weight, for example: without it the text would be another one."""
    from safetensors.torch import load_file, save_file

    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(tmp_path), NoProgress())
    for span in (Span(0, 2), Span(2, 4)):
        with pytest.raises(ModelError, match=rf"no place for {re.escape(name)}"):
            open_span(source, span)


def test_the_table_of_the_families_replaces_the_old_one():
    from node.lab.families import BEGIN, END, Family

    page = f"before {BEGIN} old {END} after"
    table = with_table(page, {"x": Family(status=FamilyStatus.REFUSED, reason="x: a | b")})
    assert (
        table
        == f"before {BEGIN}\n\n| family | status | why |\n|---|---|---|\n| `x` | refused | a \\| b |\n\n{END} after"
    )


def test_the_page_of_the_models_has_every_family():
    page = (ROOT / "docs/models.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (\w+) \|", page, re.MULTILINE))
    assert list(rows) == all_families()
    assert set(rows.values()) == {"exact", "refused"}
    assert {rows[family] for family in CERTIFIED} == {"exact"}
    assert list(rows.values()).count("exact") >= 85
    assert f"{list(rows.values()).count('exact')} of the {len(rows)} that" in (ROOT / "README.md").read_text()
