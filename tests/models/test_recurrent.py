"""Recurrent layers over trees: whatever windows come and go, each node gets the logits of its own path."""

import random

import pytest
import reference
import torch
from demand import IS_ALL
from families import NUM_LAYERS, RECURRENT, VOCAB
from prompting import prompt_of

from dsd_p2p.cache.passes import SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import CacheEdit, Forward, SlotTable
from dsd_p2p.errors import CapacityError, PrefixLost
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.recurrent.linear import LinearTerms, scan_linear
from dsd_p2p.models.recurrent.memory import LayerMemory, RecurrentMemory
from dsd_p2p.models.recurrent.paths import Paths
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span

NUM_HISTORIES = 400 if IS_ALL else 120
MAX_LENGTH = 400


class History:
    """A session over two stages whose windows, settles, cancels, rewinds, refills and second turns are drawn at random.

    Each computed node can be compared with the unsplit model, which gets the node's path as plain text.
    """

    def __init__(self, folder, stages, seed):
        self.folder, self.stages = folder, stages
        self.rng = random.Random(seed)
        self.tables = [SlotTable() for _ in stages]
        self.caches = [stage.new_cache(MAX_LENGTH, 7) for stage in stages]
        self.text: list[int] = []
        self.nodes: dict[int, tuple[int | None, int]] = {}
        self.num_nodes = 0
        self.shortest = 0
        self.num_compared = 0

    def path(self, node):
        tokens = []
        while node is not None:
            node, token = self.nodes[node]
            tokens.insert(0, token)
        return [*self.text, *tokens]

    def window(self, parents):
        """Send new nodes, in one pass or in two pieces; compare some of them."""
        names = list(range(self.num_nodes, self.num_nodes + len(parents)))
        self.num_nodes += len(parents)
        for name, parent in zip(names, parents, strict=True):
            self.nodes[name] = (parent, self.rng.randrange(2, VOCAB))
        positions = [len(self.path(name)) - 1 for name in names]
        tokens = [self.nodes[name][1] for name in names]
        forwards = [table.append(names, parents, positions) for table in self.tables]
        cut = self.rng.randrange(len(names))
        views = []
        for start, end in ((0, cut), (cut, len(names))):
            if start < end:
                views += self.run([each.part(start, end) for each in forwards], tokens[start:end])
        for at in self.rng.sample(range(len(names)), min(2, len(names))):
            expected = reference.logits(self.folder, self.path(names[at]))[-1]
            assert torch.allclose(views[at].row, expected, atol=2e-4), (views[at].row - expected).abs().max()
            self.num_compared += 1

    def run(self, forwards, tokens):
        hidden = hidden_of(self.stages[0].run([SpanPass(cache=self.caches[0], forward=forwards[0], inputs=tokens)])[0])
        passed = SpanPass(cache=self.caches[1], forward=forwards[1], inputs=hidden, wanted=range(len(tokens)))
        return views_of(self.stages[1].run([passed])[0])

    def tree(self):
        # At times a long one: it is computed in several blocks.
        num_nodes = self.rng.choice([1, 2, 5, 9, 40])
        candidates = [None, *self.nodes]
        parents: list[int | None] = []
        for offset in range(num_nodes):
            parents.append(self.rng.choice(candidates[-8:]))
            candidates.append(self.num_nodes + offset)
        self.window(parents)

    def chain(self):
        """Write what only goes on, as a prompt does."""
        end = self.rng.choice([None, *self.nodes])
        length = self.rng.choice([3, 17, 60])
        self.window([end, *range(self.num_nodes, self.num_nodes + length - 1)])

    def settle(self):
        if not self.nodes:
            return
        node = self.rng.choice(list(self.nodes))
        self.edit([table.settle(node) for table in self.tables])
        self.text = self.path(node)
        self.shortest = max(self.shortest, len(self.text) - 1)
        below = {node}
        for name, (parent, _) in sorted(self.nodes.items()):
            if parent in below:
                below.add(name)
        below.discard(node)
        self.nodes = {
            name: (None if self.nodes[name][0] == node else self.nodes[name][0], self.nodes[name][1]) for name in below
        }

    def cancel(self):
        """Drop what was not committed, as at a new epoch. At times go back by a token, as a resumed session does."""
        self.edit([table.settle(None) for table in self.tables])
        self.nodes = {}
        if len(self.text) > self.shortest and self.rng.random() < 0.5:
            self.edit([table.rewind(len(self.text) - 1) for table in self.tables])
            del self.text[-1]

    def edit(self, edits: list[CacheEdit | None]):
        for cache, edit in zip(self.caches, edits, strict=True):
            if edit is not None:
                cache.edit(edit)

    def refill(self):
        """Lose the second stage's cache and fill another from the first one's rows, in pieces."""
        self.cancel()
        if not self.text:
            return
        self.caches[1].free()
        self.caches[1] = self.stages[1].new_cache(MAX_LENGTH)
        again = self.stages[0].new_cache(MAX_LENGTH)
        source, table = SlotTable(), SlotTable()
        size = self.rng.choice([5, 33, 128])
        for start in range(0, len(self.text), size):
            names = list(range(start, min(start + size, len(self.text))))
            parents = [None, *names[:-1]]
            rows = source.append(names, parents, names)
            hidden = self.stages[0].hidden(again, rows, self.text[start : start + size])
            self.stages[1].views(self.caches[1], table.append(names, parents, names), hidden, [])
            assert [each.settle(names[-1]) for each in (source, table)] == [None, None]
        again.free()
        self.tables[1] = table

    def second_turn(self):
        """Park the text; go on from a copy of it, or from the prompt's end, where the snapshot is."""
        self.cancel()
        length = len(self.text)
        marked = [cache.recurrent._snapshot is not None for cache in self.caches]
        if all(marked) and self.rng.random() < 0.5:
            length = 7
        if not length:
            return
        copies = [stage.new_cache(MAX_LENGTH, 7) for stage in self.stages]
        for copy, cache in zip(copies, self.caches, strict=True):
            cache.shrink()
            copy.copy(cache, length)
            cache.free()
        self.caches = copies
        self.tables = [SlotTable(length) for _ in self.stages]
        self.shortest = length
        del self.text[length:]


@pytest.mark.parametrize("family", RECURRENT)
def test_every_history_gives_each_node_the_logits_of_its_own_path(tiny, family):
    folder = tiny(family)
    source = find_model(str(folder), NoProgress())
    stages = [open_span(source, Span(0, 2)), open_span(source, Span(2, NUM_LAYERS))]
    num_compared = 0
    for seed in range(NUM_HISTORIES // len(RECURRENT) + 1):
        history = History(folder, stages, seed)
        history.window([None, *range(10)])
        history.settle()
        actions = [history.tree, history.tree, history.settle, history.settle, history.chain]
        actions += [history.cancel, history.refill, history.second_turn]
        for _ in range(12):
            history.rng.choice(actions)()
            if len(history.text) > MAX_LENGTH // 3 or len(history.nodes) > MAX_LENGTH // 3:
                break
        num_compared += history.num_compared
        for cache in history.caches:
            cache.free()
    assert num_compared > NUM_HISTORIES // len(RECURRENT)
    assert [stage.budget.used_bytes for stage in stages] == [0, 0]


def stepwise(terms, parents):
    """Return what a node-by-node recurrence reads, in float64: a state for each node."""
    states, outputs = {}, []
    keys = terms.widen(terms.key).double()
    for node, parent in enumerate(parents):
        decay = terms.decay[node].double().exp()
        decay = decay[:, None, None] if decay.ndim == 1 else decay[..., None]
        key = keys[node]
        zero = torch.zeros(*key.shape, terms.value.shape[2], dtype=torch.float64)
        state = decay * (zero if parent is None else states[parent])
        write = terms.value[node].double()
        if terms.beta is not None:
            write = terms.beta[node].double()[:, None] * (write - torch.einsum("hk,hkv->hv", key, state))
        states[node] = state + key[..., None] * write[:, None]
        outputs.append(torch.einsum("hk,hkv->hv", terms.query[node].double(), states[node]))
    return torch.stack(outputs)


@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize("is_by_channel", [True, False])
def test_the_linear_form_is_the_recurrence_to_rounding(is_delta, is_by_channel):
    """Also where a path's decay is far below float32's smallest number, and over long chains."""
    rng = torch.Generator().manual_seed(0)
    for num_nodes, strength in ((1, 0.1), (200, 0.1), (200, 30.0)):
        draw = random.Random(num_nodes)
        parents = [None, *(max(0, node - draw.choice([1, 1, 1, 2, 5])) for node in range(num_nodes - 1))]
        heads, dk, dv = 4, 8, 6
        keys = torch.randn(num_nodes, 2, dk, generator=rng)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        decay_shape = (num_nodes, heads, dk) if is_by_channel else (num_nodes, heads)
        terms = LinearTerms(
            query=torch.randn(num_nodes, heads, dk, generator=rng),
            key=keys,
            value=torch.randn(num_nodes, heads, dv, generator=rng),
            decay=-strength * torch.rand(decay_shape, generator=rng),
            beta=torch.rand(num_nodes, heads, generator=rng) if is_delta else None,
            widen=lambda stored: stored.repeat_interleave(2, dim=1),
        )
        table = SlotTable()
        forward = table.append(range(num_nodes), parents, depths_of(parents))
        memory = LayerMemory(budget=CacheBudget(1 << 30))
        found = scan_linear(memory, Paths(forward.mask, "cpu"), terms)
        assert torch.allclose(found.double(), stepwise(terms, parents), atol=2e-5)


def depths_of(parents):
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent is None else depths[parent] + 1)
    return depths


def test_a_waiting_node_takes_a_row_and_not_a_state(tiny):
    stage = open_span(find_model(str(tiny("qwen3-next")), NoProgress()), Span(0, 1))
    cache = stage.new_cache(64)
    stage.hidden(cache, SlotTable().chain(1), [3])
    layer = cache.recurrent.layer(0)
    row_bytes = sum(buffer[0].nbytes for buffer in layer.rows.values())
    # Convolution inputs 2·16·2 + 4·8, keys 2·16, a decay for each of 4 heads, written 4·8.
    assert row_bytes == 4 * (96 + 32 + 4 + 32)
    assert layer.state.nbytes == 4 * 4 * 16 * 8


def test_a_failed_pass_changes_nothing(tiny, monkeypatch):
    """A layer fails half-way; the same window afterwards gets what it would have got."""
    folder = tiny("qwen3-next")
    stage = open_span(find_model(str(folder), NoProgress()), Span(0, NUM_LAYERS))
    cache, table = stage.new_cache(64), SlotTable()
    text = prompt_of(9)
    stage.views(cache, table.chain(9), text, [])
    table.settle(8)
    forward = table.append([100, 101, 102], [None, 100, 100], [9, 10, 10])
    last = stage.model.base_model.layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", lambda *_args, **_named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.views(cache, forward, [3, 4, 5], range(3))
    views = stage.views(cache, forward, [3, 4, 5], range(3))
    for view, path in zip(views, ([3], [3, 4], [3, 5]), strict=True):
        expected = reference.logits(folder, [*text, *path])[-1]
        assert torch.allclose(view.row, expected, atol=1e-4)


def test_a_session_without_room_fails_alone(tiny):
    folder = tiny("qwen3-next")
    stage = open_span(find_model(str(folder), NoProgress()), Span(0, NUM_LAYERS), cache_bytes=300_000)
    small = stage.new_cache(8)
    with pytest.raises(CapacityError, match="raise --cache-memory"):
        stage.views(small, SlotTable().chain(300), prompt_of(300), [])
    small.free()
    assert stage.budget.used_bytes == 0


def test_a_state_cannot_be_cut():
    memory = RecurrentMemory(CacheBudget(1 << 20), mark=4)
    layer = memory.layer(0)
    layer.fold = lambda state, rows: state + len(rows["x"])
    layer.start_state(torch.zeros(1), (1,))
    layer.write("x", torch.arange(12.0)[:, None], 0)
    memory.fold(num_settled=11, num_slots=12)
    assert (memory.num_folded, layer.state.item()) == (10, 10)
    with pytest.raises(PrefixLost, match="cannot go back to 9 tokens"):
        memory.edit(CacheEdit(num_kept=9, gathered=torch.empty(0, dtype=torch.int64).numpy()))
    copy = RecurrentMemory(CacheBudget(1 << 20))
    with pytest.raises(PrefixLost, match="no state after 7 tokens"):
        copy.copy(memory, 7)
    copy.copy(memory, 4)
    assert (copy.num_folded, copy.layer(0).state.item()) == (4, 4)


def test_paths_name_the_inputs_of_a_convolution():
    table = SlotTable()
    forward: Forward = table.append(range(5), [None, 0, 0, 2, None], [0, 1, 1, 2, 0])
    paths = Paths(forward.mask, "cpu")
    # Three inputs of each node: numbers below 3 are those before the waiting slots.
    assert paths.last(3).tolist() == [[1, 2, 3], [2, 3, 4], [2, 3, 5], [3, 5, 6], [1, 2, 7]]
    assert [level for level, _ in paths.levels] == [[0, 4], [1, 2], [3]]
    assert [places for _, places in paths.levels] == [[0, 0], [0, 0], [1]]
