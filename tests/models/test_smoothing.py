"""Smoothing for int8: it changes nothing that a model computes, spares the rounding, and is written with a report."""

import json
import random

import numpy as np
import pytest
import torch
from families import NUM_LAYERS, VOCAB, save_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsd_p2p.errors import ModelError
from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.formats import REPORT
from dsd_p2p.models.lean import smoothing
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.lean.quality import judge, log_probabilities
from dsd_p2p.models.lean.smoothing import smooth
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import Span
from node.cli.commands.quantize import quantize

WHOLE = Span(0, NUM_LAYERS)


def stock_of(source):
    return SpanModel(load_span(source, WHOLE, torch.float32, "cpu"), pass_order(read_model_config(source.folder)))


def texts(seed, count=6):
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCAB) for _ in range(50)] for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3"])
def test_it_changes_nothing_that_the_model_computes(family, tmp_path):
    stock = stock_of(find_model(str(save_tiny_model(family, tmp_path / family)), NoProgress()))
    before = [log_probabilities(stock, text) for text in texts(1)]
    weights = stock.model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    smooth(stock, texts(2))
    assert not torch.equal(weights, stock.model.state_dict()["model.layers.0.mlp.down_proj.weight"])
    for text, expected in zip(texts(1), before, strict=True):
        assert torch.allclose(log_probabilities(stock, text), expected, atol=2e-3)


def test_families_without_these_layers_are_refused(tmp_path):
    stock = stock_of(find_model(str(save_tiny_model("gpt2", tmp_path / "gpt2")), NoProgress()))
    with pytest.raises(ModelError, match="another build"):
        smooth(stock, texts(1))


def test_layers_that_smoothing_would_change_are_refused(tmp_path, monkeypatch):
    stock = stock_of(find_model(str(save_tiny_model("llama", tmp_path / "llama")), NoProgress()))
    monkeypatch.setattr(smoothing, "_move", lambda _norm, linears, *_: linears[0].weight.mul_(1.5))
    with pytest.raises(ModelError, match="changed what they compute"):
        smooth(stock, texts(1))


@pytest.fixture
def with_outliers(tmp_path):
    """A model with a tokenizer, of which three channels are a hundred times larger than the rest, as in real ones."""
    folder = save_tiny_model("llama", tmp_path / "model")
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    source = find_model(str(folder), NoProgress())
    stock = stock_of(source)
    with torch.inference_mode():
        for layer in stock.model.model.layers:
            for norm, linears in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[[3, 17, 40]] *= 100
                for linear in linears:
                    linear.weight[:, [3, 17, 40]] /= 100
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in stock.model.state_dict().items()}, folder / "model.safetensors"
    )
    return find_model(str(folder), NoProgress())


def test_dsd_quantize_writes_a_model_that_loses_less(with_outliers, tmp_path):
    output = tmp_path / "smoothed"
    report = quantize(with_outliers, output, NoProgress())
    before, after = report["int8_before"], report["int8"]
    assert after["agreement"] > before["agreement"]
    assert after["kl"] < before["kl"] / 2
    assert json.loads((output / REPORT).read_text())["int8"] == after
    assert set(report["fitted_on"]["prompts"]).isdisjoint(report["judged_on"]["prompts"])
    assert set(report["fitted_on"]["documentation_of"]).isdisjoint(report["judged_on"]["documentation_of"])
    smoothed = find_model(str(output), NoProgress())
    assert smoothed.key("int8") != with_outliers.key("int8")
    assert {each.name for each in tmp_path.iterdir()} == {"model", "smoothed"}
    # What the report says is what anybody finds who judges the folder.
    expected = [log_probabilities(stock_of(with_outliers), text) for text in texts(3)]
    again = judge(open_lean_span(smoothed, WHOLE), texts(3), expected)
    worse = judge(open_lean_span(with_outliers, WHOLE), texts(3), expected)
    assert again.kl < worse.kl
    assert np.isfinite(again.perplexity_growth)
