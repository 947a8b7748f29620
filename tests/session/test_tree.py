"""The draft tree's bookkeeping and where it grows."""

import math
import random

import pytest

from dsd_p2p.session.growth import choose_stems, choose_unsent, has_unsent
from dsd_p2p.session.tree import DraftTree
from dsd_p2p.window.static import continuous_tree

DECISION = continuous_tree(depth=50, width=4, window_nodes=8, max_in_flight=8, min_path_prob=0.01)


def grown(seed=0, num_nodes=60):
    tree, rng = DraftTree(token=0, position=9, key=9), random.Random(seed)
    while len(tree) < num_nodes:
        parent = rng.choice(list(tree.nodes()))
        tree.add(parent, rng.randrange(1000), math.log(rng.uniform(0.05, 0.9)))
    return tree


@pytest.mark.parametrize("seed", range(5))
def test_windows_take_the_likeliest_nodes_whose_parents_are_sent(seed):
    tree, number = grown(seed), 0
    sent = []
    while tree.root.number is None or has_unsent(tree, DECISION):
        chosen = choose_unsent(tree, DECISION, 8)
        for node in chosen:
            assert node is tree.root or node.parent.number is not None
            tree.send(node, number)
            number += 1
        sent += chosen
        left = [n for n in tree.unsent.values() if n.parent is not None and n.parent.number is not None]
        if len(chosen) > 1:
            assert max((n.path_logprob for n in left), default=-math.inf) <= min(n.path_logprob for n in chosen)
    assert {node.key for node in sent} == {n.key for n in tree.nodes() if math.exp(n.path_logprob) >= 0.01}
    assert tree.num_sent == len(sent)


def test_nodes_that_wait_for_the_drafter_are_held_with_all_below_them():
    tree = grown()
    tree.send(tree.root, 0)
    held = {max(tree.root.children.values(), key=lambda node: node.path_logprob).key}
    for node in choose_unsent(tree, DECISION, 100, held):
        at = node
        while at.parent is not None:
            assert at.key not in held
            at = at.parent


def test_stems_are_the_likeliest_nodes_before_the_end():
    tree = grown()
    stems = choose_stems(tree, DECISION, tree.root.position + 2)
    assert len(stems) <= DECISION.expand_nodes
    assert all(stem.position < tree.root.position + 2 for stem in stems)
    tree.expand(stems[0])
    assert stems[0] not in choose_stems(tree, DECISION, tree.root.position + 2)


def test_shedding_drops_the_unlikeliest_leaves_and_nothing_that_is_in_use():
    tree = grown(num_nodes=80)
    for number, node in enumerate(choose_unsent(tree, DECISION, 1)):
        tree.send(node, number)
    for number, node in enumerate(choose_unsent(tree, DECISION, 10), start=1):
        tree.send(node, number)
    in_use = {node.key for node in tree.nodes() if node.number is not None}
    before = {node.key: node.path_logprob for node in tree.nodes()}
    leaves = [n.path_logprob for n in tree.unsent.values() if not n.children]
    tree.shed(60)
    kept = {node.key for node in tree.nodes()}
    assert in_use <= kept
    assert len(tree) < 80
    dropped = [before[key] for key in before.keys() - kept]
    assert sorted(dropped) == sorted(leaves)[: len(dropped)]
    assert all(node.parent is None or node.parent.key in kept for node in tree.nodes())


def test_a_second_opinion_moves_all_below():
    tree = DraftTree(token=0, position=0, key=0)
    child = tree.add(tree.root, 5, math.log(0.5))
    grandchild = tree.add(child, 6, math.log(0.5))
    assert tree.add(tree.root, 5, math.log(0.8), rank=1) is child
    assert math.exp(child.path_logprob) == pytest.approx(0.8)
    assert math.exp(grandchild.path_logprob) == pytest.approx(0.4)
    assert child.rank == 1


def test_a_commit_keeps_the_subtree_and_rescales_it():
    tree = grown()
    hit = max(tree.root.children.values(), key=lambda node: len(list(node.subtree())))
    below = {node.key: node.path_logprob - hit.path_logprob for node in hit.subtree()}
    assert tree.commit(hit.token) is hit
    assert {node.key: pytest.approx(node.path_logprob) for node in tree.nodes()} == below
    assert tree.unsent.keys() == tree.unexpanded.keys() == below.keys()
    assert tree.commit(10_000) is None
    assert len(tree) == 0
    assert tree.root.position == hit.position + 1
