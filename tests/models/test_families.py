"""Every family, split and speculated upon, writes what transformers writes with the whole model in one piece."""

import itertools

import numpy as np
import pytest
import reference
import torch
from demand import on_demand
from families import FAMILIES, NUM_LAYERS, RECURRENT, VOCAB
from prompting import DECISIONS, prompt_of
from safetensors import safe_open
from swarms import load_stages, model_swarm

from dsd_p2p.cache.passes import SpanPass, views_of
from dsd_p2p.cache.slots import Forward, SlotTable
from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.models.open import open_span
from dsd_p2p.models.packed import PackedLinear, can_pack
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import HiddenFormat, Span, TextRequest
from dsd_p2p.window.static import StaticPolicy

OFTEN = ("llama", "gemma3", "gpt2", "qwen3-moe")
"""The families whose other splits are tested each time."""


def is_often(family, num_stages):
    if family in RECURRENT:
        # All of them are in tests/models/test_recurrent.py.
        return num_stages == 2 and family in ("qwen3-next", "granite-h")
    return num_stages == 2 or family in OFTEN


@pytest.mark.parametrize(
    ("family", "num_stages"),
    [
        pytest.param(family, num_stages, marks=() if is_often(family, num_stages) else on_demand)
        for family in FAMILIES
        for num_stages in (1, 2, 4)
    ],
)
async def test_all_modes_and_drafters_write_the_unsplit_models_text(tiny, family, num_stages):
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    stages = load_stages(source, num_stages)
    itself = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    other = ModelDrafter(open_span(find_model(str(tiny("llama")), NoProgress()), Span(0, NUM_LAYERS)), "other")
    prompt = prompt_of(11)
    expected = reference.greedy(folder, prompt, 24)
    for drafter in (NgramDrafter(), itself, other, CombinedDrafter(other)):
        async with model_swarm(stages, drafter) as swarm:
            for name, decision in DECISIONS.items():
                tokens, generation = await swarm.write(prompt, 24, decision)
                assert tokens == expected, (drafter.name, name)
                if drafter is itself and name == "sync":
                    assert generation.stats.num_epochs == 5, "the target drafting for itself: 24 tokens, five a window"
            await swarm.all_closed()


async def test_smaller_hidden_states_change_bytes_and_no_window_changes_their_text(tiny):
    """What int8 or bfloat16 on the links writes is another model's text, the same in every mode."""
    folder = tiny("llama")
    source = find_model(str(folder), NoProgress())
    drafter = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    link_bytes = {}
    async with model_swarm(load_stages(source, 2), drafter) as swarm:
        for hidden_format in HiddenFormat:
            options = GenerateOptions(text=TextRequest(max_tokens=24), hidden_format=hidden_format)
            texts = set()
            for decision in DECISIONS.values():
                async with swarm.engine.generate(prompt_of(11), options, StaticPolicy(decision)) as generation:
                    texts.add(tuple([token async for token in generation]))
                link_bytes[hidden_format, decision.mode] = generation.stats.link_bytes
            assert len(texts) == 1, hidden_format
            if hidden_format is HiddenFormat.MODEL:
                assert texts == {tuple(reference.greedy(folder, prompt_of(11), 24))}
    for mode in ("plain", "sync"):
        assert link_bytes["int8", mode] < link_bytes["bf16", mode] < link_bytes["model", mode]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_window_gives_each_node_the_logits_of_its_own_path(tiny, family):
    folder = tiny(family)
    model = open_span(find_model(str(folder), NoProgress()), Span(0, NUM_LAYERS))
    text = prompt_of(23, seed=1)
    nodes = prompt_of(9, seed=2)
    parents = [None, None, 100, 100, 101, 102, 104, 105, 105]
    depths = [0, 0, 1, 1, 1, 2, 2, 3, 3]
    slots, cache = SlotTable(), model.new_cache(64)
    prefix = slots.chain(23)
    model.views(cache, prefix, text, [])
    slots.settle(22)
    forward = slots.append(range(100, 109), parents, [23 + depth for depth in depths])
    views = model.views(cache, forward, nodes, range(9))
    for index, view in enumerate(views):
        path: list[int] = []
        at: int | None = 100 + index
        while at is not None:
            path.insert(0, nodes[at - 100])
            at = parents[at - 100]
        expected = reference.logits(folder, [*text, *path])[-1]
        assert torch.allclose(view.row, expected, atol=1e-4), (index, (view.row - expected).abs().max())

    # Committing 100 → 103 and going on from there moves keys and values to other slots.
    edit = slots.settle(103)
    assert edit is not None
    cache.edit(edit)
    last = slots.append([200], [None], [25])
    row = model.views(cache, last, [7], [0])[0].row
    expected = reference.logits(folder, [*text, nodes[0], nodes[3], 7])[-1]
    assert torch.allclose(row, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_loads_only_its_own_tensors(tiny, family):
    source = find_model(str(tiny(family)), NoProgress())
    with safe_open(source.file("model.safetensors"), "pt") as weights:
        file_bytes = sum(weights.get_tensor(name).nbytes for name in weights.keys())  # noqa: SIM118
    stages = load_stages(source, 4)
    sizes = [stage.weight_bytes for stage in stages]
    assert max(sizes) < file_bytes / 2
    is_tied = stages[0].model.config.tie_word_embeddings
    embedding_bytes = VOCAB * 64 * 4
    # Together they hold every tensor once; a tied embedding is needed at both ends.
    assert sum(sizes) == file_bytes + (embedding_bytes if is_tied else 0)
    names = {name for stage in stages for name, _ in stage.model.named_parameters()}
    assert not any("meta" in str(p.device) for stage in stages for p in stage.model.parameters())
    assert names


@pytest.mark.parametrize("family", FAMILIES)
def test_part_of_a_span_computes_what_a_stage_of_that_part_does(tiny, family):
    """And layers taken over from a donor are the donor's own tensors."""
    source = find_model(str(tiny(family)), NoProgress())
    whole = open_span(source, Span(0, NUM_LAYERS))
    middle = open_span(source, Span(1, 3))
    prompt = prompt_of(9)
    for bounds in ((0, 1, 4), (0, 2, 3, 4), (0, 3, 4)):
        outputs = []
        for spans_of in (lambda s: whole.narrow(s), lambda s: open_span(source, s, donor=middle)):
            values: object = prompt
            for first, last in itertools.pairwise(bounds):
                part = spans_of(Span(first, last))
                assert (part.is_head, part.is_tail) == (first == 0, last == NUM_LAYERS)
                forward = SlotTable().chain(9)
                cache = part.new_cache(16)
                if part.is_tail:
                    values = [view.logits() for view in part.views(cache, forward, values, range(9))]
                else:
                    values = part.hidden(cache, forward, values)
                cache.free()
            outputs.append(np.stack(values))
        expected = reference.logits(tiny(family), prompt).numpy()
        assert np.array_equal(outputs[0], outputs[1])
        # A recurrence adds up in another order than transformers' own.
        assert np.allclose(outputs[0], expected, atol=1e-4 if family in RECURRENT else 0)
    assert whole.budget.used_bytes == 0
    extended = open_span(source, Span(0, 3), donor=middle)
    pointers = [{p.data_ptr() for p in m.model.parameters()} for m in (middle, extended)]
    assert pointers[0] <= pointers[1]
    packed = [{m for m in each.model.modules() if isinstance(m, PackedLinear)} for each in (middle, extended)]
    assert packed[0] <= packed[1]
    if family == "llama" and can_pack(torch.float32, "cpu"):
        # Seven in each of two layers: attention's four and the MLP's three.
        assert len(packed[0]) == 14
    with pytest.raises(ConfigError, match="not inside"):
        middle.narrow(Span(0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_in_one_pass_see_only_themselves(tiny, family):
    """Three sessions of different lengths, one a tree, cut at any layer, together and in pieces: as if each ran alone."""
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    texts = [prompt_of(length, seed=length) for length in (23, 5, 14)]
    spans = [Span(0, 2), Span(2, NUM_LAYERS)]
    models = [open_span(source, span) for span in spans]

    def forwards() -> list[list[Forward]]:
        chains = [SlotTable().chain(len(text)) for text in texts]
        tree = SlotTable().append(range(5), [None, 0, 0, 1, 2], [0, 1, 1, 2, 2])
        whole = [chains[0], tree, chains[2]]
        cuts = [len(forward.positions) // 2 for forward in whole]
        firsts = [forward.part(0, cut) for forward, cut in zip(whole, cuts, strict=True)]
        rests = [forward.part(cut, len(forward.positions)) for forward, cut in zip(whole, cuts, strict=True)]
        return [firsts, rests]

    def run(groups: list[list[int]]) -> list[torch.Tensor]:
        caches = [[model.new_cache(64) for _ in texts] for model in models]
        rows: list[list[torch.Tensor]] = [[] for _ in texts]
        for half, parts in enumerate(forwards()):
            for group in groups:
                lengths = [len(parts[i].positions) for i in group]
                starts = [0 if half == 0 else len(texts[i]) // 2 for i in group]
                inputs = [texts[i][start : start + n] for i, start, n in zip(group, starts, lengths, strict=True)]
                hidden = models[0].run(
                    [
                        SpanPass(cache=caches[0][i], forward=parts[i], inputs=x)
                        for i, x in zip(group, inputs, strict=True)
                    ]
                )
                outputs = models[1].run(
                    [
                        SpanPass(cache=caches[1][i], forward=parts[i], inputs=x, wanted=range(n))
                        for i, x, n in zip(group, hidden, lengths, strict=True)
                    ]
                )
                for i, views in zip(group, outputs, strict=True):
                    rows[i] += [view.row for view in views]
        return [torch.stack(each) for each in rows]

    for together, alone in zip(run([[0, 1, 2]]), run([[0], [1], [2]]), strict=True):
        assert torch.allclose(together, alone, atol=1e-4)
        assert torch.equal(together.argmax(dim=-1), alone.argmax(dim=-1))


def test_what_is_wrong_with_one_session_is_not_the_others_business(tiny):
    model = open_span(find_model(str(tiny("llama")), NoProgress()), Span(0, NUM_LAYERS))
    tail = open_span(find_model(str(tiny("llama")), NoProgress()), Span(2, NUM_LAYERS))
    forward = SlotTable().append([0], [None], [0])

    def of(model: SpanModel, inputs: list[int] | bytes) -> SpanPass:
        return SpanPass(cache=model.new_cache(8), forward=forward, inputs=inputs, wanted=[0])

    wrong, right = model.run([of(model, [VOCAB]), of(model, [3])])
    assert isinstance(wrong, RemoteProtocolError)
    assert len(views_of(right)) == 1
    huge = np.full(model.shape.hidden_size, 3e38, np.float32).tobytes()
    nan = np.full(model.shape.hidden_size, np.nan, np.float32).tobytes()
    fine = np.ones(model.shape.hidden_size, np.float32).tobytes()
    alone = views_of(tail.run([of(tail, fine)])[0])[0]
    *wrong_ones, right = tail.run([of(tail, nan), of(tail, b"short"), of(tail, huge), of(tail, fine)])
    assert [type(each) for each in wrong_ones[:2]] == [RemoteProtocolError, RemoteProtocolError]
    assert torch.allclose(views_of(right)[0].row, alone.row, atol=1e-5)
