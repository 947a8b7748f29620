"""Holds the text written so far and the draft tree below its last token."""

from collections.abc import Sequence

from dsd_p2p.session.effects import NUM_CANDIDATES, Draft, Stem
from dsd_p2p.session.tree import DraftNode, DraftTree
from dsd_p2p.types import TokenId


class WrittenText:
    """Prompt and committed tokens, and the draft tree whose root holds the last of them.

    tokens: the whole text. Every token has a key, by which drafters keep their caches.
    """

    def __init__(self, prompt: Sequence[TokenId]) -> None:
        self.tokens: list[TokenId] = list(prompt)
        self._keys = list(range(len(self.tokens)))
        self.tree = DraftTree(token=self.tokens[-1], position=len(self.tokens) - 1, key=self._keys[-1])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{len(self)} tokens, {self.tree!r}"

    def commit(self, token: TokenId) -> DraftNode | None:
        """Append `token` to the text; return its node if it was in the tree, else None."""
        hit = self.tree.commit(token)
        self.tokens.append(token)
        self._keys.append(self.tree.root.key)
        return hit

    def draft_below(self, stems: Sequence[DraftNode], levels: int) -> Draft:
        """Return a question to the drafter about these nodes, and mark them as expanded."""
        for node in stems:
            self.tree.expand(node)
        return Draft(
            tokens=tuple(self.tokens),
            keys=tuple(self._keys),
            stems=tuple(Stem(key=node.key, path=_path(node)) for node in stems),
            width=NUM_CANDIDATES,
            levels=levels,
        )


def _path(node: DraftNode) -> tuple[tuple[int, TokenId], ...]:
    path: list[tuple[int, TokenId]] = []
    while node.parent is not None:
        path.append((node.key, node.token))
        node = node.parent
    return tuple(reversed(path))
