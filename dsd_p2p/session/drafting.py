"""Asks the drafter for candidates and adds its answers to the tree. At most one question is under way."""

from collections.abc import Container, Sequence

from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.session.growth import choose_stems
from dsd_p2p.session.request import RequestStats
from dsd_p2p.session.tree import DraftNode
from dsd_p2p.session.written import WrittenText
from dsd_p2p.window.base import Decision, Mode
from dsd_p2p.window.tracker import Tracker

_TREE_NODES_PER_SENT = 3
"""Nodes kept below the root for each node that may be sent.

A node that is unlikely now may become likely once the root has moved.
"""


class Drafting:
    """The drafting of one request.

    last_position: the text's last position. A node just before it yields the last token, so no deeper node is useful.
    """

    def __init__(self, text: WrittenText, last_position: int, tracker: Tracker, stats: RequestStats) -> None:
        self._text = text
        self._last_position = last_position
        self._tracker = tracker
        self._stats = stats
        self._asked: dict[int, DraftNode] | None = None
        self._asked_at_s = 0.0
        # Draft steps since the last window. In sync mode a window is sent after `decision.depth` steps.
        self._num_steps = 0

    def __repr__(self) -> str:
        return f"asked about {len(self._asked)} nodes" if self._asked is not None else "drafter idle"

    @property
    def asked_keys(self) -> Container[int]:
        """Keys of the nodes that the drafter is being asked about."""
        return self._asked or ()

    def ask(self, decision: Decision, now_s: float) -> list[Draft]:
        """Return the next question, or nothing if one is under way or no node is worth expanding."""
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
        """Add the answer to the last question to the tree: for each stem, its children, likeliest first."""
        if self._asked is None:
            return
        stems, self._asked = self._asked, None
        seconds = now_s - self._asked_at_s
        num_levels = max(map(_num_levels, answers), default=1)
        self._num_steps += num_levels - 1
        if self._stats.num_draft_steps:
            # The first step also reads the prompt, so its time says nothing about the others.
            self._tracker.draft_step(len(stems), seconds / num_levels)
        self._stats.num_draft_steps += num_levels
        self._stats.draft_s += seconds
        tree = self._text.tree
        for (key, node), candidates in zip(stems.items(), answers, strict=True):
            if tree.get(key) is node:
                self._grow(node, candidates, decision)
        tree.shed(_TREE_NODES_PER_SENT * max(decision.max_nodes, decision.depth))

    def is_window_full(self, decision: Decision) -> bool:
        """Return True if a window in sync mode will not grow any further."""
        is_deep = self._num_steps >= decision.depth
        return is_deep or (self._asked is None and not self._choose_stems(decision))

    def window_sent(self) -> None:
        """Note that a window was sent, and restart the count of draft steps."""
        self._num_steps = 0

    def _choose_stems(self, decision: Decision) -> list[DraftNode]:
        return choose_stems(self._text.tree, decision, self._last_position - 1)

    def _grow(self, node: DraftNode, candidates: Sequence[Candidate], decision: Decision) -> None:
        """Add a drafter's answer below `node`."""
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
    """Return how many draft steps an answer stands for: one, plus one for each complete level nested below."""
    num_levels = 1
    while (below := next((each.children for each in candidates if each.is_complete), ())) != ():
        num_levels, candidates = num_levels + 1, below
    return num_levels
