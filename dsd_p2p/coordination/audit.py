"""Checks that the stages of a route compute what they claim, with signed windows and spot checks on a replica.

How it works. Each stage signs a hash of every row that it receives and of every row that it sends (`.signed`). The
coordinator checks that neighbours signed the same rows, so that nothing was changed between them and no layer was left
out. Every few windows, one stage must show the rows that it sent. A peer that holds the same layers recomputes them over
the whole text, and the rows are compared (`.tolerance`). The stages take turns in a random order. Before the answer
ends, every stage is checked up to the end.

Nobody is judged by one word. A check counts if the stage and the replica came with different invites. If they differ,
a second replica of a third invite decides. Without one, the answer ends with an error that names nobody.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsd_p2p.coordination.directory import OURSELVES, Replica
from dsd_p2p.coordination.signed import SignedWindows
from dsd_p2p.coordination.tolerance import first_wrong_pick, first_wrong_row, tolerance_of
from dsd_p2p.errors import AuditIncomplete, DishonestPeer, PeerDisconnected, PeerError
from dsd_p2p.peers.links import Arrived
from dsd_p2p.types import ModelKey, PeerId, SessionId, Span, TextRequest, TokenId, short_peer
from dsd_p2p.wire.attest import ALWAYS_PROBED, PROBE_BYTES, row_errors
from dsd_p2p.wire.hidden import to_float32
from dsd_p2p.wire.messages import (
    MAX_RECOMPUTED,
    MAX_REVEALED,
    Hop,
    OpenSession,
    Recompute,
    Recomputed,
    Reveal,
    Revealed,
    Verdict,
    Window,
)

_CYCLE_WINDOWS = 24
"""Windows in which every stage has its turn.

The last check ends before the next turn is due. With three or more stages that is at most a third of a cycle later, at
window 32.
"""

_FIRST_PIECE, _PIECE_BYTES = 16, 1 << 20
"""Rows of the first question to a stage, and bytes of each later one: a slow link carries them within the deadline."""

_MAX_WITNESSES = 4
"""The most replicas that are asked about one stage, some of which may not answer."""

Ask = Callable[[PeerId, Reveal | Recompute, bytes], Awaitable[Arrived]]
"""A function that sends a message to a peer and returns the answer; it raises PeerError if none comes in time."""

Replicas = Callable[[Span, str], Sequence[Replica]]
"""Returns the connected peers that hold a span, except the given one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One check, of stage number `hop` over the text's first tokens.

    following: the token after them, -1 if there is none. num_given: tokens that the route did not pick.
    """

    hop: int
    tokens: tuple[TokenId, ...]
    following: int
    num_given: int
    model: ModelKey
    signed: SignedWindows

    @property
    def end(self) -> int:
        """The number of positions."""
        return len(self.tokens)

    @property
    def stage(self) -> Hop:
        """The stage to check."""
        return self.signed.hops[self.hop]

    @property
    def is_of_tail(self) -> bool:
        """True if the stage is the tail."""
        return self.hop == len(self.signed.hops) - 1


class Auditor:
    """The auditor of one request: it follows the windows and verdicts, and checks the stages of the route.

    num_prompt: tokens of the prompt, which no stage picked. root_of: returns the invite that a peer came with.
    shuffle: puts a list into random order.
    checked: for each stage, the number of positions that were checked.
    """

    def __init__(
        self,
        *,
        session: SessionId,
        num_prompt: int,
        text: TextRequest,
        replicas: Replicas,
        root_of: Callable[[str], str],
        ask: Ask,
        shuffle: Callable[[list[int]], None],
    ) -> None:
        self._session = session
        self._num_prompt = num_prompt
        self._text = text
        self._replicas = replicas
        self._root_of = root_of
        self._ask = ask
        self._shuffle = shuffle
        self._signed = SignedWindows(())
        self._turns: list[int] = []
        self._num_windows = 0
        self._num_given = num_prompt
        self._model: ModelKey | None = None
        self.checked: list[int] = []
        self.num_checks = 0
        self.num_unchecked = 0

    def opened(self, opened: OpenSession) -> None:
        """Start over on a newly opened route, which receives the whole text again."""
        self._model = opened.model
        self._num_given = opened.num_given
        self._signed = SignedWindows(opened.route)
        self.checked = [0] * len(opened.route)
        self._num_windows = 0
        self._turns = []

    def sent(self, window: Window, num_committed: int) -> None:
        """Note that a window is sent; its nodes at positions below `num_committed` are committed."""
        self._num_windows += 1
        self._signed.sent(window, num_committed)

    def heard(self, verdict: Verdict) -> None:
        """Check the stages' signatures. Call this before acting on the verdict.

        Raises:
            DishonestPeer: names the stage whose signed rows differ from its neighbour's, or that did not sign.
        """
        self._signed.heard(verdict)

    def committed(self, position: int, epoch: int, node: int) -> None:
        """Note which sent node holds the committed token at `position`."""
        self._signed.committed(position, epoch, node)

    @property
    def _every(self) -> int:
        return max(1, _CYCLE_WINDOWS // max(1, len(self._signed.hops)))

    @property
    def is_overdue(self) -> bool:
        """True when the next spot check is due; the one under way must then end before the text goes on."""
        return self._num_windows >= self._every

    def turn(self, tokens: Sequence[TokenId]) -> Turn | None:
        """Return the spot check that is due, or None. tokens: the prompt and all committed tokens."""
        if self._num_windows < self._every:
            return None
        if not self._turns:
            self._turns = list(range(len(self._signed.hops)))
            self._shuffle(self._turns)
        turn = self._turn_of(self._turns[-1], tokens)
        if turn.end <= self.checked[turn.hop]:
            return None
        # Keep the order for the next cycle: a new shuffle could put the first stage last, almost two cycles later.
        self._turns.insert(0, self._turns.pop())
        # A turn that came late because nothing new could be checked does not delay the next one.
        self._num_windows -= self._every
        return turn

    def last_turns(self, tokens: Sequence[TokenId]) -> Iterator[Turn]:
        """Yield the checks that are missing when the text is complete."""
        for hop in range(len(self._signed.hops)):
            turn = self._turn_of(hop, tokens)
            if turn.end > self.checked[hop]:
                yield turn

    def missing(self, num_tokens: int) -> AuditIncomplete | None:
        """Return the error that says what was not checked of a text, or None. num_tokens: its length.

        Nothing is computed at its last position.
        """
        for hop, checked in zip(self._signed.hops, self.checked, strict=True):
            if checked < num_tokens - 1:
                return AuditIncomplete(
                    f"layers {hop.span} of peer {short_peer(hop.peer)} were checked for {checked} of {num_tokens - 1} "
                    "positions: no peer with these layers and another invite answered"
                )
        return None

    def _turn_of(self, hop: int, tokens: Sequence[TokenId]) -> Turn:
        end = min(self._signed.num_complete(), MAX_RECOMPUTED, len(tokens))
        assert self._model is not None, "a route is open"
        return Turn(
            hop=hop,
            tokens=tuple(tokens[:end]),
            following=tokens[end] if end < len(tokens) else -1,
            num_given=self._num_given,
            model=self._model,
            signed=self._signed,
        )

    async def check(self, turn: Turn) -> None:
        """Carry out a check.

        Raises:
            DishonestPeer: names the peer that lied.
            AuditIncomplete: the stage and a replica differ, and nobody can tell who lied.
            PeerDisconnected: the stage was lost.
        """
        inputs = b"" if turn.hop == 0 else await self._shown(turn, turn.hop - 1)
        outputs = await self._shown(turn, turn.hop)
        if self._is_right(turn, await self._ask_witnesses(turn, inputs, outputs)) and turn.signed is self._signed:
            self.checked[turn.hop] = max(self.checked[turn.hop], turn.end)

    async def _ask_witnesses(self, turn: Turn, inputs: bytes, outputs: bytes) -> list[tuple[Replica, int | None]]:
        """Return what replicas say: the first wrong position, or None if all is right. Ask until two contradict nobody."""
        said: list[tuple[Replica, int | None]] = []
        are_given_tokens_open = turn.is_of_tail and turn.num_given > self._num_prompt
        if self._root_of(turn.stage.peer) == OURSELVES and not are_given_tokens_open:
            return [(Replica(PeerId(turn.stage.peer), OURSELVES), None)]
        for replica in witnesses(self._replicas, self._root_of, turn.stage)[:_MAX_WITNESSES]:
            try:
                wrong_at = await self._differs(turn, replica.peer, inputs, outputs)
            except AuditIncomplete:
                raise
            except PeerError:
                continue
            said.append((replica, wrong_at))
            if wrong_at is None or len(said) == 2 or replica.root == OURSELVES:
                break
        return said

    def _is_right(self, turn: Turn, said: Sequence[tuple[Replica, int | None]]) -> bool:
        """Judge a stage by what its replicas say. Return False if none answered."""
        if not said:
            self.num_unchecked += 1
            return False
        self.num_checks += 1
        stage, (last, wrong_at) = turn.stage, said[-1]
        if wrong_at is None:
            if len(said) > 1:
                raise DishonestPeer(said[0][0].peer, "its recomputation differs from two others'")
            return True
        text = f"output of layers {stage.span} at position {wrong_at} differs from that of"
        if turn.is_of_tail and self._num_prompt - 1 <= wrong_at < turn.num_given - 1:
            raise AuditIncomplete(
                f"the token at {wrong_at + 1}, from a route that was lost unchecked, is wrong: ask again"
            )
        if len(said) > 1 or last.root == OURSELVES:
            raise DishonestPeer(stage.peer, f"its {text} {len(said)} replica(s)")
        raise AuditIncomplete(
            f"peer {short_peer(stage.peer)} or {short_peer(last.peer)} lies: the {text} the other, and no third peer "
            "with these layers and another invite can tell: add one, or ask again"
        )

    async def _shown(self, turn: Turn, index: int) -> bytes:
        """Return the rows that stage number `index` sent for the turn's positions; ask for those that are new."""
        hop, shown = turn.signed.hops[index], turn.signed.shown[index]
        is_tail = index == len(turn.signed.hops) - 1
        while shown.num_rows < turn.end:
            start = shown.num_rows
            end = min(start + _piece(shown.row_bytes), turn.end)
            asked = Reveal(session=self._session, start=start, end=end, at=turn.signed.node_at(end - 1))
            try:
                answer = await self._ask(PeerId(hop.peer), asked, b"")
            except PeerDisconnected:
                raise
            except PeerError as exc:
                if turn.signed is not self._signed:
                    raise
                raise AuditIncomplete(f"{short_peer(hop.peer)} did not show what it computed: {exc}", hop.peer) from exc
            if turn.signed is not self._signed:
                # The stage may have answered for the route that followed.
                raise PeerDisconnected("the route was lost during the check")
            message, rows = answer.message, bytes(answer.payload)
            assert isinstance(message, Revealed)
            if (message.start, message.num_rows) == (start, 0):
                raise AuditIncomplete(f"{short_peer(hop.peer)} no longer holds what it computed: ask again", hop.peer)
            row_bytes = len(rows) // (end - start)
            is_sized = row_bytes == PROBE_BYTES if is_tail else shown.row_bytes in (0, row_bytes)
            if (message.start, message.num_rows) != (start, end - start) or len(rows) % (end - start) or not is_sized:
                raise DishonestPeer(hop.peer, f"it showed {message.num_rows} of {end - start} rows, {len(rows)} bytes")
            if not turn.signed.is_signed_by(index, start, rows, row_bytes):
                raise DishonestPeer(hop.peer, f"a row that it showed from {start} on does not match its signed hash")
            shown.add(rows, end - start)
        return shown.first(turn.end)

    async def _differs(self, turn: Turn, replica: PeerId, inputs: bytes, outputs: bytes) -> int | None:
        """Return the first position at which a replica gets something else than the stage, or None.

        Raises:
            PeerError: the replica gave no answer that can be compared.
        """
        asked = Recompute(
            request=secrets.token_bytes(8),
            span=turn.stage.span,
            model=turn.model,
            tokens=turn.tokens,
            text=self._text,
            num_prompt=min(self._num_prompt, turn.end),
            following=turn.following,
        )
        answer = await self._ask(replica, asked, inputs)
        message, rows = answer.message, bytes(answer.payload)
        assert isinstance(message, Recomputed)
        if message.error or len(rows) != len(outputs):
            raise PeerDisconnected(message.error or "the replica sent too few rows")
        tolerance = tolerance_of(turn.model.weights)
        mean = tolerance.mean(message.noise / 1e6, turn.end)
        if not turn.is_of_tail:
            claimed, computed = (to_float32(each, turn.model.compute).reshape(turn.end, -1) for each in (outputs, rows))
            return first_wrong_row(row_errors(claimed, computed), mean, tolerance.row)
        if len(message.gaps) != turn.end:
            raise PeerDisconnected("the replica judged too few tokens")
        first_pick = self._num_prompt - 1
        wrong = first_wrong_pick(message.gaps[first_pick:], tolerance)
        if wrong is not None:
            return first_pick + wrong
        probed = np.array([at for at in range(turn.end) if at < ALWAYS_PROBED or at >= turn.num_given - 1])
        claimed, computed = (np.frombuffer(each, "<f4").reshape(turn.end, -1)[probed] for each in (outputs, rows))
        wrong = first_wrong_row(row_errors(claimed, computed), mean, tolerance.row)
        return None if wrong is None else int(probed[wrong])


def _piece(row_bytes: int) -> int:
    """Return how many rows to ask for at once, given the size of the rows that were shown, 0 before the first."""
    return min(MAX_REVEALED, max(1, _PIECE_BYTES // row_bytes)) if row_bytes else _FIRST_PIECE


def witnesses(replicas: Replicas, root_of: Callable[[str], str], stage: Hop) -> list[Replica]:
    """Return the replicas that may judge a stage: none of its own invite, and one of each other."""
    found: dict[str, Replica] = {}
    root = root_of(stage.peer)
    for replica in replicas(stage.span, stage.peer):
        if replica.root != root:
            found.setdefault(replica.root, replica)
    return list(found.values())
