"""A text over a chain of spans, run in windows and trees, to compare bits."""

import itertools

import numpy as np
from families import VOCAB

from dsd_p2p.cache.slots import SlotTable


class Text:
    """One session over a chain of spans."""

    def __init__(self, spans, max_slots=512):
        self.spans = spans
        self.caches = [span.new_cache(max_slots) for span in spans]
        self.slots = SlotTable()

    def run(self, names, parents, positions, tokens):
        """Return the logits of the nodes."""
        forward = self.slots.append(names, parents, positions)
        data = tokens
        for span, cache in zip(self.spans[:-1], self.caches, strict=False):
            data = span.hidden(cache, forward, data)
        views = self.spans[-1].views(self.caches[-1], forward, data, range(len(names)))
        return np.stack([view.logits() for view in views])

    def prompt(self, tokens, pieces=1):
        bounds = np.linspace(0, len(tokens), pieces + 1).astype(int)
        for start, end in itertools.pairwise(bounds):
            names = range(start, end)
            if len(names):
                self.run(names, [name - 1 if name else None for name in names], names, tokens[start:end])
        self.settle(len(tokens) - 1)
        return self

    def settle(self, node):
        edit = self.slots.settle(node)
        if edit is not None:
            for cache in self.caches:
                cache.edit(edit)


def random_tree(rng, context, count):
    """Names, parents, positions and tokens of a tree below the prompt's end."""
    names = list(range(1000, 1000 + count))
    parents, positions = [], []
    for index in range(count):
        parent = rng.choice([None, *names[:index]])
        parents.append(parent)
        positions.append(context if parent is None else positions[names.index(parent)] + 1)
    return names, parents, positions, [rng.randrange(VOCAB) for _ in names]


def alone(spans, prompt, path):
    """The logits after each token of a path, decoded one by one."""
    text = Text(spans).prompt(prompt)
    rows = []
    for index, token in enumerate(path):
        name = 1000 + index
        rows.append(text.run([name], [None if not index else name - 1], [len(prompt) + index], [token])[0])
    return np.stack(rows)


def path_of(tree, index):
    names, parents, _, tokens = tree
    path = []
    name = names[index]
    while name is not None:
        at = names.index(name)
        path.insert(0, tokens[at])
        name = parents[at]
    return path
