"""What the drafter is asked, and what its answers add to the tree. At most one question is under way."""

from collections.abc import Container, Sequence

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.session.growth import choose_stems
from dsd_p2p.session.request import RequestStats
from dsd_p2p.session.tree import DraftNode
from dsd_p2p.session.written import WrittenText
from dsd_p2p.window.base import Decision, Mode
from dsd_p2p.window.tracker import Tracker

_TREE_NODES_PER_SENT = 3
"""Nodes kept below the root for each that may be sent: what is unlikely now may be likely once the root has moved."""


class Drafting:
    """last_position: the text's last one. A node at the position before it yields the last token; nothing deeper is of use."""

    def __init__(self, text: WrittenText, last_position: int, tracker: Tracker, stats: RequestStats) -> None:
        self._text = text
        self._last_position = last_position
        self._tracker = tracker
        self._stats = stats
        self._asked: dict[int, DraftNode] | None = None
        self._asked_at_s = 0.0
        # Draft steps since the last window; a synchronous window is sent after `decision.depth` of them.
        self._num_steps = 0

    def __repr__(self) -> str:
        return f"asked about {len(self._asked)} nodes" if self._asked is not None else "drafter idle"

    @property
    def asked_keys(self) -> Container[int]:
        """Keys of the nodes that the drafter is being asked about."""
        return self._asked or ()

    def ask(self, decision: Decision, now_s: float) -> list[Draft]:
        """Return the next question; none while one is under way, or when nothing is worth asking."""
        root_is_sent = self._text.tree.root.number is not None
        is_wanted = decision.mode is Mode.CONTINUOUS or (decision.mode is Mode.SYNC and not root_is_sent)
        if self._asked is not None or not is_wanted:
            return []
        stems = self._choose_stems(decision)
        if not stems:
            return []
        self._asked = {node.key: node for node in stems}
        self._asked_at_s = now_s
        is_chain = decision.mode is Mode.SYNC and decision.width == 1
        levels = decision.depth - self._num_steps if is_chain else 1
        self._num_steps += 1
        return [self._text.draft_below(stems, levels)]

    def take(self, answers: Sequence[Sequence[Candidate]], decision: Decision, now_s: float) -> None:
        """Hang the answer to the last question into the tree: for each stem its children, likeliest first."""
        if self._asked is None:
            return
        stems, self._asked = self._asked, None
        seconds = now_s - self._asked_at_s
        num_levels = max(map(_num_levels, answers), default=1)
        self._num_steps += num_levels - 1
        if self._stats.num_draft_steps:
            # The first one reads the prompt as well, and tells nothing of the others.
            self._tracker.draft_step(len(stems), seconds / num_levels)
        self._stats.num_draft_steps += num_levels
        self._stats.draft_s += seconds
        tree = self._text.tree
        for (key, node), candidates in zip(stems.items(), answers, strict=True):
            if tree.get(key) is node:
                self._grow(node, candidates, decision)
        tree.shed(_TREE_NODES_PER_SENT * max(decision.max_nodes, decision.depth))

    def is_window_full(self, decision: Decision) -> bool:
        """True when a synchronous window is as large as it will get."""
        is_deep = self._num_steps >= decision.depth
        return is_deep or (self._asked is None and not self._choose_stems(decision))

    def window_sent(self) -> None:
        """Note that a window has left: the next one starts from no steps."""
        self._num_steps = 0

    def _choose_stems(self, decision: Decision) -> list[DraftNode]:
        return choose_stems(self._text.tree, decision, self._last_position - 1)

    def _grow(self, node: DraftNode, candidates: Sequence[Candidate], decision: Decision) -> None:
        """Hang a drafter's answer below `node`."""
        node.candidates = tuple((candidate.token, candidate.logprob) for candidate in candidates)
        sharpened = self._tracker.sharpened([candidate.logprob for candidate in candidates])
        kept = list(zip(candidates, sharpened, strict=True))[: decision.width]
        tree = self._text.tree
        for rank, (candidate, logprob) in enumerate(kept):
            child = tree.add(node, candidate.token, logprob, rank, candidate.source)
            self._stats.num_drafted_nodes += 1
            if candidate.children and not child.is_expanded and child.position < self._last_position - 1:
                if candidate.is_complete:
                    tree.expand(child)
                self._grow(child, candidate.children, decision)


def _num_levels(candidates: Sequence[Candidate]) -> int:
    """How many draft steps an answer stands for: those of complete answers below one another."""
    num_levels = 1
    while (below := next((each.children for each in candidates if each.is_complete), ())) != ():
        num_levels, candidates = num_levels + 1, below
    return num_levels
