"""Shared by several tests."""

import random

from families import VOCAB

from dsd_p2p.window.static import PLAIN, continuous_tree, sync_chain

DECISIONS = {
    "plain": PLAIN,
    "sync": sync_chain(4),
    "chain": continuous_tree(depth=8, width=1, window_nodes=2, max_in_flight=4),
    "tree": continuous_tree(depth=8, width=3, window_nodes=5, max_in_flight=4),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=length)
