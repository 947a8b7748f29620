"""Walks the tail down the draft tree and commits the target's picks (docs/protocol.md, rule 6: The walk).

The walk stands at the newest node for which it has the target's pick, and waits for a child that holds that pick.
Every other node that arrives is stale for good. A node's parent is always sent before the node, so all descendants of
the awaited child are still on their way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.types import TokenId, TokenLogprobs
from dsd_p2p.wire.messages import BASE, Verdict, Window, WindowAttestation


@dataclass(slots=True, kw_only=True)
class Committed:
    """The picks that one window committed, from `start_pos` on, and the node that holds each (`BASE`: none yet)."""

    start_pos: int
    tokens: list[TokenId] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)


def verdict_of(
    window: Window,
    committed: Committed,
    *,
    num_live: int,
    num_relaxed: int = 0,
    relaxed_micronats: int = 0,
    attestations: Sequence[WindowAttestation] = (),
    logprobs: Sequence[TokenLogprobs] = (),
) -> Verdict:
    """Return the verdict on `window`, with the window's measurements. `committed` must not be empty."""
    return Verdict(
        session=window.session,
        epoch=window.epoch,
        window=window.window,
        start_pos=committed.start_pos,
        tokens=tuple(committed.tokens),
        settled=tuple(committed.settled),
        num_live=num_live,
        num_stale=len(window.tokens) - num_live,
        costs=window.costs,
        link_bytes=window.link_bytes,
        num_relaxed=num_relaxed,
        relaxed_micronats=relaxed_micronats,
        attestations=tuple(attestations),
        logprobs=tuple(logprobs),
        waited=window.waited,
    )


class TailWalk:
    """The walk of one session at its tail.

    num_prompt: tokens of the prompt. num_given: tokens at positions below this are accepted without verification.
    at: the node at which the walk starts; for a kept tail, the last but one of the given tokens.
    """

    def __init__(self, *, epoch: int, num_prompt: int, num_given: int, at: int = BASE) -> None:
        self._epoch = epoch
        self._num_prompt = num_prompt
        self._num_given = num_given
        self._at = at
        self._awaited: TokenId | None = None
        self._next_commit_pos = num_given

    def live(self, window: Window) -> list[int]:
        """Return the offsets of the window's nodes that can still be committed; each comes after its parent.

        Raises:
            RemoteProtocolError: the window opens an epoch off the committed path.
        """
        at = self._at
        if window.epoch != self._epoch:
            if window.root != (self._epoch, at):
                raise RemoteProtocolError("root", window.root, f"{(self._epoch, at)}, where the walk stands")
            at = BASE
        offsets: list[int] = []
        numbers: set[int] = set()
        for offset, parent in enumerate(window.parents):
            follows_walk = parent == at and self._is_awaited(window, offset)
            if follows_walk or parent in numbers:
                offsets.append(offset)
                numbers.add(window.first_node + offset)
        return offsets

    def wants_pick(self, position: int) -> bool:
        """Return True if the target must pick the token after `position`, which is not given."""
        return position >= self._num_given - 1

    def walk(
        self, window: Window, live: Sequence[int], pick: Callable[[int], TokenId], written: Callable[[TokenId], None]
    ) -> Committed:
        """Go on through the window's `live` nodes, committing the target's pick at each.

        pick: maps an index into `live` to the target's token for the position after that node.
        written: called with each given token after the prompt; a replay sends those that were written before.
        """
        if window.epoch != self._epoch:
            self._epoch, self._at = window.epoch, BASE
        committed = Committed(start_pos=self._next_commit_pos)
        children: dict[int, list[int]] = {}
        for row, parent_offset in enumerate(live):
            children.setdefault(window.parents[parent_offset], []).append(row)
        while (index := self._find_child(window, live, children)) is not None:
            offset = live[index]
            self._at = window.first_node + offset
            self._awaited = None
            if committed.tokens:
                committed.settled[-1] = self._at
            position = window.positions[offset]
            if self._num_prompt <= position < self._num_given:
                written(window.tokens[offset])
            if self.wants_pick(position):
                self._awaited = pick(index)
                committed.tokens.append(self._awaited)
                committed.settled.append(BASE)
                self._next_commit_pos += 1
        return committed

    def _find_child(self, window: Window, live: Sequence[int], children: dict[int, list[int]]) -> int | None:
        for index in children.get(self._at, ()):
            if self._is_awaited(window, live[index]):
                return index
        return None

    def _is_awaited(self, window: Window, offset: int) -> bool:
        return self._awaited is None or window.tokens[offset] == self._awaited
