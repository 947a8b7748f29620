"""Numbers epochs, nodes and windows, and tracks windows in flight (docs/protocol.md, rule 3: Nodes; rule 4: Roots)."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsd_p2p.session.request import NODE_S, RequestStats
from dsd_p2p.types import SessionId, TokenId
from dsd_p2p.wire.messages import BASE, FILL_NODES, Cancel, DraftTop, Verdict, Window

_MAX_PATIENCE_S = 600.0
"""The longest time that nodes in flight add to the stall timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    window: int
    num_nodes: int
    sent_at_s: float


class Flight:
    """The windows of one request: it makes them and tracks those that have no verdict yet.

    epoch: the present epoch, -1 before the first. next_node: number of the next node in it.
    root: the newest node known to be committed, as (epoch, node).
    progress_at_s: start of the stall timeout: the last committed token, or a window sent while none was in flight.
    traversal_s: traversal of the last window whose verdict came.
    """

    def __init__(self, session: SessionId, stats: RequestStats) -> None:
        self._session = session
        self._stats = stats
        self.epoch = -1
        self.next_node = 0
        self._next_window = 0
        self.root = (0, BASE)
        self._in_flight: list[_Sent] = []
        self.progress_at_s = 0.0
        self.traversal_s = 0.0

    def __len__(self) -> int:
        """Return the number of windows without a verdict."""
        return len(self._in_flight)

    @property
    def patience_s(self) -> float:
        """Seconds that the stages may need for all nodes in flight. A long prompt takes minutes on slow machines."""
        return min(_MAX_PATIENCE_S, NODE_S * sum(each.num_nodes for each in self._in_flight))

    def __repr__(self) -> str:
        return f"epoch {self.epoch}, {len(self)} windows in flight, next node {self.next_node}"

    def raise_epoch(self) -> None:
        """Begin the next epoch: nodes are numbered from 0 again."""
        self.epoch += 1
        self._stats.num_epochs += 1
        self.next_node = 0

    def opened(self, now_s: float) -> None:
        """Note that a session was opened in the present epoch; no window is in flight yet."""
        self._in_flight.clear()
        self.root = (self.epoch, BASE)
        self.progress_at_s = now_s

    def held(self, num_tokens: int) -> None:
        """Count the first tokens, which the stages already have, as sent: nodes from 0 on, in a chain."""
        if num_tokens:
            self.next_node = num_tokens
            self.root = (self.epoch, num_tokens - 1)

    def skip_refill(self, num_tokens: int) -> None:
        """Leave free the window numbers in which one stage refills the next with so many tokens."""
        self._next_window = max(self._next_window, -(-num_tokens // FILL_NODES))

    def window(
        self,
        tokens: Sequence[TokenId],
        parents: Sequence[int],
        positions: Sequence[int],
        first_node: int,
        now_s: float,
        drafts: tuple[DraftTop, ...] = (),
    ) -> Window:
        """Return a window with these nodes and count it as in flight."""
        window = Window(
            session=self._session,
            epoch=self.epoch,
            window=self._next_window,
            root=self.root,
            first_node=first_node,
            tokens=tuple(tokens),
            parents=tuple(parents),
            positions=tuple(positions),
            drafts=drafts,
        )
        if not self._in_flight:
            self.progress_at_s = now_s
        self._in_flight.append(_Sent(window=self._next_window, num_nodes=len(tokens), sent_at_s=now_s))
        self._next_window += 1
        stats = self._stats
        stats.num_windows += 1
        stats.num_nodes_sent += len(tokens)
        stats.max_windows_in_flight = max(stats.max_windows_in_flight, len(self._in_flight))
        return window

    def landed(self, verdict: Verdict, now_s: float) -> bool:
        """Note a verdict. Return True if its window was in flight; `traversal_s` is then set."""
        sent = next((each for each in self._in_flight if each.window == verdict.window), None)
        if sent is not None:
            self.traversal_s = now_s - sent.sent_at_s
        # Frames arrive in order, so the tail is done with every window up to this one.
        self._in_flight = [each for each in self._in_flight if each.window > verdict.window]
        return sent is not None

    def clear(self) -> None:
        """Stop waiting for verdicts."""
        self._in_flight.clear()

    def cancel(self) -> Cancel:
        """Return the message that makes stages drop the windows of earlier epochs."""
        return Cancel(session=self._session, epoch=self.epoch)
