"""Passes over shared buffers, as a GPU replays them: they compute what separate passes do, whatever ran before."""

import random
import threading
import types

import numpy as np
import pytest
import reference
import torch
from families import FAMILIES, NUM_LAYERS, RECURRENT, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_text import Text, path_of, random_tree
from prompting import DECISIONS, prompt_of
from swarms import model_swarm

from dsd_p2p.cache.passes import SpanPass, views_of
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import CapacityError, ConfigError, ModelError, PrefixLost
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.captured.arena import Arena
from dsd_p2p.models.captured.buffers import Bucket
from dsd_p2p.models.captured.graphs import Graphs
from dsd_p2p.models.captured.span import CapturedSpan
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.span import PassOrder
from dsd_p2p.types import Span

WHOLE = Span(0, NUM_LAYERS)


class Replays:
    """Captures as CUDA does: a replay runs over the same buffers and overwrites the outputs of the one before."""

    def __init__(self):
        self.num_captured = self.num_replayed = 0

    def __call__(self, compute, buffers):
        outputs = compute(buffers)
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            again = compute(buffers)
            for old, new in ((outputs.values, again.values), (outputs.best, again.best)):
                if old is not None:
                    old.copy_(new)
            if outputs.is_finite is not None:
                outputs.is_finite.copy_(again.is_finite)
            return outputs

        return replay


def captured(folder, span=WHOLE, **options):
    source = find_model(str(folder), NoProgress())
    return CapturedSpan(load_span(source, span, torch.float32, "cpu"), **options)


def ragged_families(tiny):
    # Recurrent layers run without graphs.
    others = [family for family in FAMILIES if family not in RECURRENT]
    return [family for family in others if pass_order(read_model_config(tiny(family))) is PassOrder.TOGETHER]


def test_every_family_that_takes_sessions_together_writes_transformers_text(tiny):
    families = ragged_families(tiny)
    assert {"llama-tied", "qwen2-sliding", "gemma3", "mixtral", "gpt2"} <= set(families)
    for family in families:
        replays = Replays()
        spans = [captured(tiny(family), Span(0, 3), capture=replays), captured(tiny(family), Span(3, 4))]
        prompt = prompt_of(11)
        expected = reference.greedy(tiny(family), prompt, 24)
        text, tokens = Text(spans).prompt(prompt[:-1]), [prompt[-1]]
        for position in range(10, 34):
            logits = text.run([position], [None], [position], tokens[-1:])
            text.settle(position)
            tokens.append(int(logits[0].argmax()))
        assert tokens[1:] == expected, family
        assert replays.num_replayed > 20, family


async def test_swarms_with_a_captured_drafter_write_the_same_text_in_all_modes(tiny):
    folder = tiny("gemma3")
    replays = Replays()
    stages = [captured(folder, span, capture=replays) for span in (Span(0, 2), Span(2, 4))]
    drafter = ModelDrafter(captured(tiny("gemma3"), capture=replays), "itself")
    expected = reference.greedy(folder, prompt_of(9), 32)
    async with model_swarm(stages, drafter) as swarm:
        for name, decision in DECISIONS.items():
            tokens, _ = await swarm.write(prompt_of(9), 32, decision)
            assert tokens == expected, name
        await swarm.all_closed()
    assert replays.num_replayed > replays.num_captured


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from families import save_tiny_model

    folder = save_tiny_model("gemma3", tmp_path_factory.mktemp("captured") / "gemma3")
    return open_span(find_model(str(folder), NoProgress()), WHOLE), captured(folder, capture=Replays())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_history_of_windows_and_edits_gives_the_logits_of_separate_caches(pair, seed):
    """Three sessions; windows of random trees, alone or in one pass; paths are committed, windows are dropped."""
    rng = random.Random(seed)
    texts = [[Text([model], 400) for _ in range(3)] for model in pair]
    lengths = [rng.choice((1, 7, 70, 130)) for _ in range(3)]
    for index, length in enumerate(lengths):
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        for each in texts:
            each[index].prompt(prompt, pieces=rng.randrange(1, 3))
    for _ in range(4):
        chosen = rng.sample(range(3), rng.randrange(1, 4))
        trees = {index: random_tree(rng, lengths[index], rng.randrange(1, 12)) for index in chosen}
        found = [_run_together(model, each, trees) for model, each in zip(pair, texts, strict=True)]
        for index in chosen:
            assert np.allclose(found[0][index], found[1][index], atol=1e-4), index
            names = trees[index][0]
            node = rng.choice([None, *names])
            for each in texts:
                each[index].settle(node)
                each[index].settle(None)
            lengths[index] += 0 if node is None else len(path_of(trees[index], names.index(node)))
    for each in texts:
        for text in each:
            text.caches[0].free()
    assert pair[1].budget.used_bytes == 0


def _run_together(model, texts, trees):
    passes = [
        SpanPass(
            cache=texts[index].caches[0],
            forward=texts[index].slots.append(*tree[:3]),
            inputs=tree[3],
            wanted=range(len(tree[0])),
        )
        for index, tree in trees.items()
    ]
    outputs = [np.stack([view.logits() for view in views_of(each)]) for each in model.run(passes)]
    return dict(zip(trees, outputs, strict=True))


def test_growing_moves_what_is_stored_and_voids_older_graphs(tiny):
    replays = Replays()
    model = captured(tiny("llama"), capture=replays)
    first = Text([model], 40).prompt(prompt_of(20))
    before = [first.run([1000 + index], [None], [20], [3]) for index in range(3)]
    assert (replays.num_captured, replays.num_replayed) == (2, 2), (
        "the prompt's pass and the window's; two of three again"
    )
    second = Text([model], 5000).prompt(prompt_of(20))
    after = first.run([2000], [None], [20], [3])
    assert (replays.num_captured, replays.num_replayed) == (4, 2), "a graph of the old buffers ran again"
    assert all(np.allclose(each, after, atol=1e-5) for each in before)
    assert np.allclose(second.run([1], [None], [20], [3]), after, atol=1e-5)


def test_a_session_without_numbers_harms_no_other(tiny):
    model = captured(tiny("llama"))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[130] = torch.nan
    good, bad = (Text([model], 64).prompt(prompt_of(5)) for _ in range(2))
    found = [_run_together(model, (good, bad), {0: ([100], [None], [5], [7])})[0]]
    passes = [
        SpanPass(cache=each.caches[0], forward=each.slots.append([101], [None], [5]), inputs=[token], wanted=[0])
        for each, token in ((bad, 130), (good, 7))
    ]
    failed, fine = model.run(passes)
    assert isinstance(failed, ModelError)
    found += [view.logits()[None] for view in views_of(fine)]
    # The failed session's slots become another's.
    bad.caches[0].free()
    found.append(Text([model], 64).prompt(prompt_of(5)).run([1], [None], [5], [7]))
    assert all(np.allclose(each, found[0], atol=1e-5) for each in found)


def test_slots_are_bounded_given_back_copied_and_parked(tiny):
    model = captured(tiny("llama"), cache_bytes=300 * captured(tiny("llama")).slot_bytes)
    text = Text([model], 200).prompt(prompt_of(60))
    with pytest.raises(CapacityError, match="MiB are free"):
        model.new_cache(200)
    text.caches[0].shrink()
    other = Text([model], 200)
    with pytest.raises(PrefixLost, match="only 60"):
        other.caches[0].copy(text.caches[0], 61)
    other.caches[0].copy(text.caches[0], 30)
    other.slots.prefix_length = 30
    found = other.run([7], [None], [30], [5])
    other.caches[0].free()
    other.caches[0].free()
    fresh = Text([model], 200).prompt(prompt_of(60)[:30])
    assert np.allclose(found, fresh.run([7], [None], [30], [5]), atol=1e-5)


def test_a_session_opened_during_a_pass_moves_nothing_under_it(tiny):
    model = captured(tiny("llama"))
    expected = Text([model], 40).prompt(prompt_of(20)).run([100], [None], [20], [3])
    text = Text([model], 40).prompt(prompt_of(20))
    compute, opened = model._compute, []

    def opens_another(buffers):
        opened.append(model.new_cache(5000))
        return compute(buffers)

    model._compute = opens_another
    found = text.run([100], [None], [20], [3])
    model._compute = compute
    after = text.run([101], [None], [20], [3])
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(after, expected, atol=1e-5)


def test_memory_that_is_not_there_for_more_slots_changes_nothing(tiny, monkeypatch):
    model = captured(tiny("llama"))
    first = Text([model], 40).prompt(prompt_of(20))
    expected = first.run([100], [None], [20], [3])
    second = Text([model], 5000)
    larger, made = Arena._larger, []

    def fails_once(self, old):
        made.append(old)
        if len(made) == 3:
            raise RuntimeError("CUDA out of memory")
        return larger(self, old)

    monkeypatch.setattr(Arena, "_larger", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        second.prompt(prompt_of(20))
    second.slots = SlotTable()
    assert np.allclose(first.run([101], [None], [20], [3]), expected, atol=1e-5)
    assert np.allclose(second.prompt(prompt_of(20)).run([1], [None], [20], [3]), expected, atol=1e-5)


def test_parts_of_a_span_stay_within_its_budget_together(tiny):
    whole = captured(tiny("llama"), cache_bytes=1000 * captured(tiny("llama")).slot_bytes)
    parts = [whole.narrow(Span(index, index + 1)) for index in range(NUM_LAYERS)]
    caches = [parts[0].new_cache(400), parts[1].new_cache(400)]
    with pytest.raises(CapacityError):
        parts[2].new_cache(400)
    caches[0].free()
    parts[2].new_cache(400).free()


def test_threads_that_share_a_span_take_turns(tiny):
    """Two requests draft with one model."""
    model = captured(tiny("llama"), capture=Replays())
    expected = Text([model], 64).prompt(prompt_of(9)).run([100], [None], [9], [4])
    wrong = []

    def draft():
        text = Text([model], 64).prompt(prompt_of(9))
        for number in range(30):
            row = text.run([100 + number], [None], [9], [4])
            text.settle(None)
            wrong.extend([number] if not np.allclose(row, expected, atol=1e-5) else [])

    threads = [threading.Thread(target=draft) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_part_of_a_span_shares_slots_but_no_graphs(tiny):
    model = captured(tiny("llama"), capture=Replays())
    expected = Text([model], 64).prompt(prompt_of(9)).run([100], [None], [9], [4])
    parts = Text([model.narrow(Span(0, 1)), model.narrow(Span(1, 4))], 64)
    found = parts.prompt(prompt_of(9)).run([100], [None], [9], [4])
    assert np.allclose(found, expected, atol=1e-5)


def test_a_model_that_cannot_be_captured_still_runs_and_says_so(tiny, caplog):
    def refuse(compute, buffers):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = captured(tiny("llama"), capture=refuse)
    text = Text([model], 64).prompt(prompt_of(9))
    rows = [text.run([100 + index], [None], [9], [4]) for index in range(2)]
    assert np.allclose(*rows, atol=1e-5)
    assert caplog.text.count("cannot be captured") == 1


def test_buckets_hold_what_is_put_into_them_and_are_few():
    seen = set()
    for rows in range(1, 65):
        for slots in (rows, 100, 128, 129, 4000):
            for wanted in (0, 1, rows):
                bucket = Bucket.of(rows, max(rows, slots), wanted)
                assert bucket.rows >= rows
                assert bucket.slots >= max(rows, slots)
                assert bucket.wanted >= wanted
                assert (bucket.wanted == 0) == (wanted == 0)
                seen.add(bucket)
    assert len(seen) < 80
    prompt = Bucket.of(512, 700, 1)
    assert (prompt.rows, prompt.slots, prompt.wanted, prompt.is_captured) == (512, 704, 1, False)


def test_a_gpu_gets_graphs_unless_its_layers_take_one_session_each(tiny, monkeypatch):
    """Without a GPU, only the choice can be tested."""
    from dsd_p2p.models import open as opening

    chosen = []

    def load(source, *_args):
        return types.SimpleNamespace(shape=read_shape(source.folder))

    monkeypatch.setattr(opening, "load_span", load)

    def choose(name):
        chosen.append(name)
        return types.SimpleNamespace(shape=types.SimpleNamespace(vocab_size=VOCAB))

    monkeypatch.setattr(opening, "CapturedSpan", lambda *args, **options: choose("captured"))
    monkeypatch.setattr(opening, "SpanModel", lambda *args, **options: choose("separate"))
    for family, expected in (("llama", "captured"), ("gemma2-eager", "separate"), ("qwen3-next", "separate")):
        open_span(find_model(str(tiny(family)), NoProgress()), WHOLE, device="cuda")
        assert chosen.pop() == expected, family


def test_passes_run_as_they_are_without_a_capture(tiny):
    graphs = Graphs(None)
    bucket = Bucket.of(1, 1, 0)
    made = []
    for _ in range(2):
        buffers = graphs.buffers(bucket, lambda: made.append(1) or object())
        assert graphs.run(bucket, buffers, lambda given: ("ran", given), 0) == ("ran", buffers)
    assert len(made) == 1


@pytest.mark.parametrize("device", ["cuda:99", "cpus"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(tiny, device):
    with pytest.raises(ConfigError, match=f"--device {device}: torch cannot use it here .*; use --device cpu"):
        open_span(find_model(str(tiny("llama")), NoProgress()), WHOLE, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_graphs_on_a_card_give_transformers_text(tiny):
    model = open_span(find_model(str(tiny("llama")), NoProgress()), WHOLE, device="cuda")
    assert isinstance(model, CapturedSpan)
    prompt = prompt_of(11)
    text, tokens = Text([model]).prompt(prompt[:-1]), [prompt[-1]]
    for position in range(10, 34):
        tokens.append(int(text.run([position], [None], [position], tokens[-1:])[0].argmax()))
        text.settle(position)
    assert tokens[1:] == reference.greedy(tiny("llama"), prompt, 24)
