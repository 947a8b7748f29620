"""`--draft auto`: it finds siblings by their tokenizer, refuses others with a sentence, measures, and changes its mind."""

import random

import pytest
import reference
import torch
from families import FAMILIES, VOCAB
from prompting import prompt_of
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsd_p2p.drafting import choice as choosing
from dsd_p2p.drafting.choice import DrafterChoice, Loop
from dsd_p2p.drafting.measuring import Coverage, coverage_of
from dsd_p2p.drafting.named import LOOKUP, make_drafter
from dsd_p2p.drafting.siblings import check_vocabulary, siblings_beside
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model

SLOW_LOOP = Loop(traversal_s=0.2, slowest_s=0.01)


def words(seed: int) -> list[str]:
    names = [f"word{number}" for number in range(VOCAB)]
    random.Random(seed).shuffle(names)
    return names


def save(folder, family, *, tokenizer_seed, num_layers=2, **sizes):
    """Save a tiny model with a tokenizer of its own."""
    config = FAMILIES[family]()
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    for name, size in sizes.items():
        setattr(config, name, size)
    torch.manual_seed(num_layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {word: token for token, word in enumerate(words(tokenizer_seed))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words(tokenizer_seed)[0]))
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "granite"])
def test_a_target_in_no_catalog_gets_the_sibling_beside_it(tmp_path, family):
    target = save(tmp_path / "target", family, tokenizer_seed=1, num_layers=4, intermediate_size=1024)
    sibling = save(tmp_path / "sibling", family, tokenizer_seed=1, intermediate_size=64, num_layers=1)
    stranger = save(tmp_path / "stranger", family, tokenizer_seed=2, intermediate_size=128)
    choice = DrafterChoice("auto", find_model(str(target), NoProgress()))
    assert {str(sibling), str(stranger)} <= set(siblings_beside(find_model(str(target), NoProgress())))
    choice.load()
    assert choice.current.name == f"{sibling}+ngram", choice.refusals
    with pytest.raises(ConfigError, match=r"its tokenizer differs from the target's, token \d+ is 'word"):
        check_vocabulary(target, stranger, str(stranger))

    text = reference.greedy(target, prompt_of(12), 40)
    choice.learn([*prompt_of(12), *text], 12, SLOW_LOOP)
    by_name = {each.name: each for each in choice.rated}
    assert by_name[f"{sibling}+ngram"].coverage.num_tokens == 40
    # A random model guesses nothing, and the shadow of the target nearly everything.
    assert choice.current.name == "shadow+ngram"
    assert by_name["shadow+ngram"].coverage.rate > 0.9 > by_name[f"{sibling}+ngram"].coverage.rate


def test_strangers_are_refused_in_a_sentence_and_the_shadow_drafts(tmp_path):
    target = save(tmp_path / "target", "llama", tokenizer_seed=1, num_layers=4, intermediate_size=1024)
    stranger = save(tmp_path / "stranger", "llama", tokenizer_seed=2, intermediate_size=64)
    choice = DrafterChoice("auto", find_model(str(target), NoProgress()))
    choice.load()
    assert choice.current.name == "shadow+ngram"
    assert len(choice.refusals) == 1
    assert str(stranger) in choice.refusals[0]
    assert "choose a drafter with the target's tokenizer" in choice.refusals[0]


def test_without_memory_for_the_shadow_lookup_drafts(tmp_path):
    target = save(tmp_path / "target", "llama", tokenizer_seed=1, num_layers=2)
    choice = DrafterChoice("auto", find_model(str(target), NoProgress()), room_bytes=1000)
    choice.load()
    assert choice.current is LOOKUP
    assert "GB of memory" in choice.refusals[0]


def test_until_it_is_loaded_lookup_drafts(tiny):
    choice = DrafterChoice("shadow", find_model(str(tiny("llama")), NoProgress()))
    assert choice.current is LOOKUP
    choice.load()
    assert choice.current.name == "shadow"


def test_a_drafter_asked_for_by_name_is_loaded_or_an_error(tmp_path):
    target = save(tmp_path / "target", "llama", tokenizer_seed=1)
    stranger = save(tmp_path / "stranger", "llama", tokenizer_seed=2)
    choice = DrafterChoice(str(stranger), find_model(str(target), NoProgress()))
    with pytest.raises(ConfigError, match="tokenizer differs"):
        choice.load()
    assert choice.current is LOOKUP


def test_a_sibling_may_pad_its_embeddings_differently(tmp_path):
    """As Qwen 2.5's sizes do: neither drafts the other's padding, nor fails on it."""
    target = save(tmp_path / "target", "qwen2", tokenizer_seed=1, vocab_size=VOCAB + 5)
    for name, size in (("wider", VOCAB + 64), ("narrower", VOCAB)):
        sibling = save(tmp_path / name, "qwen2", tokenizer_seed=1, vocab_size=size)
        drafter = make_drafter(str(sibling), find_model(str(target), NoProgress()), NoProgress())
        text = [VOCAB + 4, *prompt_of(20)]
        assert len(coverage_of(drafter, text, 5)) == 16


def test_coverage_is_that_of_stepping_token_by_token(tiny):
    source = find_model(str(tiny("llama")), NoProgress())
    text = [*prompt_of(9), *reference.greedy(tiny("llama"), prompt_of(9), 20)]
    assert coverage_of(make_drafter(str(tiny("llama")), source, NoProgress()), text, 9) == [True] * 20
    assert coverage_of(LOOKUP, [1, 2, 3, 1, 2, 3, 1, 2, 3], 6) == [True] * 3


def test_a_better_drafter_needs_more_than_noise(tiny, monkeypatch):
    """One lucky answer does not move the choice; a clear lead does."""
    choice = DrafterChoice("auto", find_model(str(tiny("llama")), NoProgress()))
    choice.load()
    assert choice.current.name == "shadow+ngram"
    monkeypatch.setattr(choosing, "coverage_of", lambda drafter, _tokens, _num: [drafter is LOOKUP] * 64)
    choice.learn([1] * 80, 10, Loop(traversal_s=0.2, slowest_s=0.001))
    assert choice.current is LOOKUP


def test_a_prior_fades():
    coverage = Coverage(prior=0.9)
    coverage.add([False] * 200)
    assert coverage.rate < 0.15
