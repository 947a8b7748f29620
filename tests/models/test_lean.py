"""int8 spans: they agree with transformers, windows change no bit, and a machine that breaks this is found out."""

import random

import numpy as np
import pytest
import torch
from families import FAMILIES, NUM_LAYERS, VOCAB, save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_text import Text, alone, path_of, random_tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from dsd_p2p.cache.passes import SpanPass, views_of
from dsd_p2p.drafting.shadow import make_shadow
from dsd_p2p.errors import ModelError
from dsd_p2p.models.formats import LEAN_FAMILIES
from dsd_p2p.models.lean import check, products
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span

LEAN = ("llama-tied", "qwen2-sliding", "gemma3")
WHOLE = Span(0, NUM_LAYERS)


@pytest.fixture(scope="module", params=LEAN)
def opened(request, tmp_path_factory):
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp("lean") / request.param)
    source = find_model(str(folder), NoProgress())
    return source, open_lean_span(source, WHOLE)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_bit_depends_on_window_tree_split_or_pieces(opened, seed):
    rng = random.Random(seed)
    _, model = opened
    context = rng.choice((1, 2, 5, 31, 33, 127, 129, 190, 260))
    prompt = [rng.randrange(VOCAB) for _ in range(context)]
    tree = random_tree(rng, context, rng.randrange(1, 24))
    cut = rng.randrange(1, NUM_LAYERS)
    parts = [model.narrow(Span(0, cut)), model.narrow(Span(cut, NUM_LAYERS))]
    whole = Text([model]).prompt(prompt, pieces=rng.randrange(1, 4)).run(*tree)
    assert np.array_equal(whole, Text(parts).prompt(prompt).run(*tree)), "a split changed bits"
    pieces = Text([model]).prompt(prompt)
    one_by_one = [pieces.run(*([part[index : index + 1] for part in tree]))[0] for index in range(len(tree[0]))]
    assert np.array_equal(whole, np.stack(one_by_one)), "windows of one node differ"
    index = rng.randrange(len(tree[0]))
    assert np.array_equal(whole[index], alone([model], prompt, path_of(tree, index))[-1]), "a tree's node differs"


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_bit_depends_on_other_sessions_or_earlier_edits(opened, seed):
    rng = random.Random(seed)
    _, model = opened
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 40, 150)))] for _ in range(3)]
    trees = [random_tree(rng, len(prompt), rng.randrange(1, 9)) for prompt in prompts]
    texts = [Text([model]).prompt(prompt) for prompt in prompts]
    passes = []
    for text, tree in zip(texts, trees, strict=True):
        forward = text.slots.append(*tree[:3])
        passes.append(SpanPass(cache=text.caches[0], forward=forward, inputs=tree[3], wanted=range(len(tree[0]))))
    together = [np.stack([view.logits() for view in views_of(each)]) for each in model.run(passes)]
    for prompt, tree, logits in zip(prompts, trees, together, strict=True):
        assert np.array_equal(logits, Text([model]).prompt(prompt).run(*tree)), "another session changed bits"
    # Commit a path: its nodes move together and the others go. What follows is as if only they had ever been there.
    text, tree = texts[0], trees[0]
    index = rng.randrange(len(tree[0]))
    path = path_of(tree, index)
    text.settle(tree[0][index])
    token = rng.randrange(VOCAB)
    after = text.run([5000], [None], [len(prompts[0]) + len(path)], [token])
    assert np.array_equal(after[0], alone([model], prompts[0], [*path, token])[-1])


def test_two_threads_give_the_same_bits(opened):
    _, model = opened
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB) for _ in range(200)]
    tree = random_tree(rng, 200, 16)
    one = Text([model]).prompt(prompt).run(*tree)
    torch.set_num_threads(2)
    try:
        two = Text([model]).prompt(prompt).run(*tree)
        stepwise = Text([model]).prompt(prompt)
        rows = [stepwise.run(*([part[index : index + 1] for part in tree]))[0] for index in range(16)]
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(two, np.stack(rows))
    assert np.array_equal(one, two)


def test_it_is_near_the_float_model(opened):
    source, model = opened
    rng = random.Random(4)
    tokens = [rng.randrange(VOCAB) for _ in range(40)]
    found = Text([model]).run(range(40), [None, *range(39)], range(40), tokens)
    expected = Text([open_span(source, WHOLE)]).run(range(40), [None, *range(39)], range(40), tokens)
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_a_prefix_is_copied_and_a_parked_text_shrinks(opened):
    _, model = opened
    tokens = list(range(1, 60))
    text = Text([model]).prompt(tokens)
    reserved = model.budget.used_bytes
    text.caches[0].shrink()
    assert model.budget.used_bytes < reserved
    other = Text([model])
    other.caches[0].copy(text.caches[0], 30)
    other.slots.prefix_length = 30
    found = other.run([7], [None], [30], [5])
    assert np.array_equal(found, Text([model]).prompt(tokens[:30]).run([7], [None], [30], [5]))
    text.caches[0].free()
    other.caches[0].free()


def test_a_moving_stage_keeps_its_layers_and_ends(opened):
    source, model = opened
    part = open_lean_span(source, Span(1, 3))
    moved = open_lean_span(source, Span(1, NUM_LAYERS), donor=part)
    assert [a.run is b.run for a, b in zip(moved.layers, part.layers, strict=False)] == [True, True]
    tokens = list(range(20))
    whole = Text([model]).run(range(20), [None, *range(19)], range(20), tokens)
    split = Text([model.narrow(Span(0, 1)), moved]).run(range(20), [None, *range(19)], range(20), tokens)
    assert np.array_equal(whole, split)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LEAN)))
def test_other_families_are_right_or_refused(family, tmp_path):
    source = find_model(str(save_tiny_model(family, tmp_path / family)), NoProgress())
    try:
        model = open_lean_span(source, WHOLE)
    except ModelError as exc:
        assert "no int8 form" in str(exc)
        assert "--weights float" in str(exc)
        return
    tokens = list(range(30))
    found, expected = (
        Text([each]).run(range(30), [None, *range(29)], range(30), tokens) for each in (model, open_span(source, WHOLE))
    )
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.fixture
def unscripted(monkeypatch):
    """Scripted layers would not see a faked kernel."""
    from dsd_p2p.models.lean import build

    monkeypatch.setattr(build, "_scripted", lambda layer: layer)


def test_a_machine_whose_rows_depend_on_each_other_runs_row_by_row(tmp_path, monkeypatch, unscripted, caplog):
    """The faked kernel rounds otherwise when it gets few rows, as MKL's does."""
    source = find_model(str(save_tiny_model("llama", tmp_path / "llama")), NoProgress())
    right = products.Int8Product.forward

    def depends_on_rows(self, rows):
        return right(self, rows) * (1 + 1e-6 * len(rows))

    monkeypatch.setattr(products.Int8Product, "forward", depends_on_rows)
    model = open_lean_span(source, WHOLE)
    assert model.is_by_row
    assert "row by row" in caplog.text
    rng = random.Random(5)
    prompt = [rng.randrange(VOCAB) for _ in range(140)]
    tree = random_tree(rng, 140, 12)
    whole = Text([model]).prompt(prompt).run(*tree)
    for index in range(12):
        assert np.array_equal(whole[index], alone([model], prompt, path_of(tree, index))[-1])


def test_a_machine_that_repeats_nothing_is_refused(tmp_path, monkeypatch, unscripted):
    source = find_model(str(save_tiny_model("llama", tmp_path / "llama")), NoProgress())
    right = products.Int8Product.forward
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        products.Int8Product, "forward", lambda self, rows: right(self, rows) * (1 + 1e-5 * float(rng.random()))
    )
    with pytest.raises(ModelError, match="same bits twice"):
        open_lean_span(source, WHOLE)


def test_a_layer_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    source = find_model(str(save_tiny_model("llama", tmp_path / "llama")), NoProgress())
    monkeypatch.setattr(check, "_TOLERANCE", 0.0)
    with pytest.raises(ModelError, match="differ from transformers"):
        open_lean_span(source, WHOLE)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_bit_depends_on_many_windows_in_flight(opened, seed):
    """More drafted slots than the attention adds up in one product."""
    rng = random.Random(seed)
    _, model = opened
    context = rng.choice((1, 60, 120, 200))
    prompt = [rng.randrange(VOCAB) for _ in range(context)]
    names, parents, positions, tokens = tree = random_tree(rng, context, 260)
    text = Text([model]).prompt(prompt)
    logits = []
    start = 0
    while start < len(names):
        end = min(start + rng.randrange(1, 17), len(names))
        logits.append(text.run(names[start:end], parents[start:end], positions[start:end], tokens[start:end]))
        start = end
    found = np.concatenate(logits)
    for index in [*rng.sample(range(len(names)), 3), positions.index(max(positions)), len(names) - 1]:
        assert np.array_equal(found[index], alone([model], prompt, path_of(tree, index))[-1])


def test_threads_that_part_a_wide_row_change_no_bit(tmp_path):
    """torch parts more than 32,768 elements among its threads, in the middle of a row."""
    config = FAMILIES["llama"]()
    config.intermediate_size = 4864
    torch.manual_seed(0)
    folder = tmp_path / "wide"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    model = open_lean_span(find_model(str(folder), NoProgress()), WHOLE)
    gate = torch.randn(32, 4864)
    layer = model.layers[0].run
    torch.set_num_threads(3)
    try:
        together = layer._activated(gate)
        alone = torch.cat([layer._activated(row[None]) for row in gate])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_in_a_sentence(tmp_path, value):
    folder = save_tiny_model("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(folder), NoProgress())
    for opens in (lambda: open_lean_span(source, WHOLE), lambda: make_shadow(source, NUM_LAYERS)):
        with pytest.raises(ModelError, match="weights are not finite: fetch them again"):
            opens()


def test_every_family_that_is_chosen_unasked_has_a_lean_form(tmp_path):
    seen = set()
    shape = FAMILIES["llama"]().to_dict() | {"model_type": "mistral", "sliding_window": 8}
    configs = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "gemma3")}
    configs["mistral"] = lambda: MistralConfig.from_dict(shape)
    for name, make in configs.items():
        config = make()
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
        open_lean_span(find_model(str(tmp_path / name), NoProgress()), Span(0, 1))
        seen.add(config.model_type)
    assert seen == set(LEAN_FAMILIES)
