"""Quantised safetensors: read as what they stand for, kept in their 4 bits where asked, refused where unknown."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from families import NUM_LAYERS, VOCAB
from lean_text import Text, alone, path_of, random_tree
from packing import FORMATS, HAS_4_BITS, gptq, pack_folder, words
from safetensors.torch import load_file, save_file

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.methods import unpacked
from dsd_p2p.models.formats import REPORT, choose_format
from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span

WHOLE = Span(0, NUM_LAYERS)
TOKENS = [random.Random(5).randrange(VOCAB) for _ in range(40)]


def logits(source, dtype, *cuts):
    bounds = [0, *cuts, NUM_LAYERS]
    spans = [open_span(source, Span(first, last), dtype=dtype) for first, last in itertools.pairwise(bounds)]
    return Text(spans).run(range(40), [None, *range(39)], range(40), TOKENS)


@pytest.fixture(scope="module", params=FORMATS)
def packed(request, tiny, tmp_path_factory):
    pack, config = FORMATS[request.param]
    target = tmp_path_factory.mktemp("packed") / "model"
    plain = pack_folder(tiny("llama"), target, pack, config)
    return request.param, find_model(str(target), NoProgress()), find_model(str(plain), NoProgress())


def test_the_weights_are_what_the_packed_numbers_stand_for(packed):
    name, source, plain = packed
    assert set(source.weights.names) == set(plain.weights.names)
    found, expected = load_whole(source, torch.float32).state_dict(), load_whole(plain, torch.float32).state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-7, msg=f"{name}: {key}")


def test_only_the_spans_tensors_are_read_and_a_split_changes_nothing(packed):
    _, source, _ = packed
    assert np.array_equal(logits(source, "float32"), logits(source, "float32", 1, 3))
    read = []
    opened = source.weights.opened
    source.weights.opened = lambda names: opened(read.append(list(names)) or read[-1])
    open_span(source, Span(1, 2))
    del source.weights.opened
    assert {int(name.split(".")[2]) for name in read[0]} == {1}


def test_stored_keeps_the_4_bits_and_is_near_the_floats(packed):
    name, source, plain = packed
    stored = open_span(source, WHOLE, dtype="stored")
    expected = logits(plain, "float32")
    found = logits(source, "stored")
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995
    as_int8 = open_span(source, WHOLE, dtype="int8")
    if name in HAS_4_BITS:
        assert stored.weight_bytes < 0.8 * as_int8.weight_bytes
        # What the kernel rounds to bfloat16 is all that separates them.
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert choose_format(source, "cpu", 1 << 40) == "stored"
    assert choose_format(plain, "cpu", 1 << 40) == "float32"
    # Once dsd quantize has judged a folder, int8 counts where it fits.
    for agreement, form in ((0.97, "int8"), (0.9, "stored")):
        (source.folder / REPORT).write_text(json.dumps({"int8": {"agreement": agreement}}))
        assert choose_format(source, "cpu", 1 << 40) == form
        assert choose_format(source, "cpu", 1000) == "stored"
    (source.folder / REPORT).unlink()


def test_stored_is_exact_in_every_window_tree_and_split(tiny, tmp_path):
    """The products are the same in all formats."""
    pack_folder(tiny("llama"), tmp_path / "model", *FORMATS["gptq"])
    model = open_span(find_model(str(tmp_path / "model"), NoProgress()), WHOLE, dtype="stored")
    assert not model.is_by_row
    rng = random.Random(7)
    for context in (1, 33, 190):
        prompt = [rng.randrange(VOCAB) for _ in range(context)]
        tree = random_tree(rng, context, 20)
        whole = Text([model]).prompt(prompt, pieces=2).run(*tree)
        parts = [model.narrow(Span(0, 2)), model.narrow(Span(2, NUM_LAYERS))]
        assert np.array_equal(whole, Text(parts).prompt(prompt).run(*tree))
        for index in (0, 7, 19):
            assert np.array_equal(whole[index], alone([model], prompt, path_of(tree, index))[-1])


def test_a_changed_part_is_noticed(tiny, tmp_path):
    pack_folder(tiny("llama"), tmp_path / "model", *FORMATS["gptq"])
    source = find_model(str(tmp_path / "model"), NoProgress())
    open_span(source, Span(1, 2))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"] *= 2
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.scales has changed on disk"):
        open_span(source, Span(1, 2))
    open_span(source, Span(2, 3))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq are not supported"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version gemv"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, "several formats"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "no tensor is called"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 0}}, "in 0 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "x"}}, "is broken"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 7}}, "is broken"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}, "is broken"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tiny, tmp_path, settings, reason):
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match=reason):
        find_model(str(tmp_path), NoProgress())


def test_a_part_that_is_missing_is_named(tiny, tmp_path):
    pack_folder(tiny("llama"), tmp_path / "model", *FORMATS["gptq"])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model.layers.2.mlp.up_proj.scales"):
        find_model(str(tmp_path / "model"), NoProgress())


def test_8_bits_without_a_scale_are_refused(tiny, tmp_path):
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight is in F8_E4M3 without a scale"):
        open_span(find_model(str(tmp_path), NoProgress()), WHOLE)


def test_experts_in_mxfp4_are_those_that_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from dsd_p2p.models.checkpoints.methods import method_of

    rng = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 64, 2, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(118, 132, (3, 64, 2), dtype=torch.uint8, generator=rng)
    found = method_of({"quant_method": "mxfp4"}).floats({"blocks": blocks, "scales": scales})
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_numbers_of_three_bits_are_refused():
    with pytest.raises(ValueError, match="3-bit"):
        unpacked(torch.zeros(2, 2, dtype=torch.int32), 3, dim=0)


def test_the_second_version_of_gptq_stores_zeros_as_they_are(tiny, tmp_path):

    def second(weight):
        parts, floats = gptq(weight)
        zeros = unpacked(parts["qzeros"], 4, dim=1) + 1
        return parts | {"qzeros": words(zeros, 4, 1)}, floats

    config = FORMATS["gptq"][1] | {"checkpoint_format": "gptq_v2"}
    plain = pack_folder(tiny("llama"), tmp_path / "v2", second, config)
    found = load_whole(find_model(str(tmp_path / "v2"), NoProgress()), torch.float32).state_dict()
    expected = load_file(plain / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
