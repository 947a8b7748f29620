"""Checks that the stages of a route compute what they claim, with signed windows and spot checks on a replica.

Each stage signs a hash of every row that it receives and of every row that it sends. The coordinator checks that
neighbours signed the same rows, so that nothing was changed between them and no layer was left out. Every few windows,
one stage must show the rows that it sent. A peer that holds the same layers recomputes them over the whole text, and
the rows are compared. The stages take turns in a random order. On a route of three or more stages, each stage is
checked within 32 windows.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsd_p2p.coordination.signed import SignedWindows
from dsd_p2p.errors import DishonestPeer, PeerError
from dsd_p2p.peers.links import Arrived
from dsd_p2p.types import INT8, STORED, ModelKey, PeerId, SessionId, Span, TextRequest, TokenId
from dsd_p2p.wire.attest import hash_rows, row_hash
from dsd_p2p.wire.hidden import to_float32
from dsd_p2p.wire.messages import (
    MAX_RECOMPUTED,
    Attestation,
    Hop,
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

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, INT8: 0.15, STORED: 0.15}
"""Largest relative error of a row, in the Euclidean norm, by the format of the weights.

Other window sizes and machines change only the last bits; a lie changes the first. int8 products of a CPU without VNNI
round to half as many steps: ten layers of SmolLM2-135M then differ by up to 0.08.
"""

_MAX_GAP_MILLI = {"float32": 50, "bfloat16": 1500, "float16": 300, INT8: 2000, STORED: 2000}
"""Thousandths of a logit by which a greedy token may fall short of the replica's pick and still count as a near-tie."""

_MAX_LAG = 64
"""How many positions a stage may lag in knowing what is committed; it learns this from the windows that follow."""

Ask = Callable[[PeerId, Reveal | Recompute, bytes], Awaitable[Arrived]]
"""A function that sends a message to a peer and returns the answer; it raises PeerError if none comes in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One spot check, of stage number `hop` over the text's first tokens.

    first_unchecked: the first position that was not checked before. signed: for each position, what this stage and the
    one before it (None at the head) signed, and the position's offset in its window.
    """

    hop: int
    tokens: tuple[TokenId, ...]
    first_unchecked: int
    signed: tuple[tuple[Attestation, Attestation | None, int], ...]


class Auditor:
    """The auditor of one request: it follows the windows and verdicts, and spot-checks the stages of the route.

    num_prompt: tokens of the prompt, which no stage picked. replicas: returns the connected peers that hold a span,
    except the given one. shuffle: puts a list into random order.
    checked: for each stage, the position up to which it was checked.
    """

    def __init__(
        self,
        *,
        session: SessionId,
        num_prompt: int,
        text: TextRequest,
        replicas: Callable[[Span, str], Sequence[PeerId]],
        ask: Ask,
        shuffle: Callable[[list[int]], None],
    ) -> None:
        self._session = session
        self._num_prompt = num_prompt
        self._text = text
        self._replicas = replicas
        self._ask = ask
        self._shuffle = shuffle
        self._signed = SignedWindows(())
        self._turns: list[int] = []
        self._num_windows = 0
        self.checked: list[int] = []
        self.num_checks = 0
        self.num_unchecked = 0

    def opened(self, hops: tuple[Hop, ...], model: ModelKey) -> None:
        """Start over on a newly opened route, which receives the whole text again."""
        self._model = model
        self._signed = SignedWindows(hops)
        self.checked = [0] * len(hops)
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
        hop, end = self._turns[-1], min(self._signed.num_complete(), MAX_RECOMPUTED, len(tokens))
        if end <= self.checked[hop]:
            return None
        # Keep the order for the next cycle: a new shuffle could put the first stage last, almost two cycles later.
        self._turns.insert(0, self._turns.pop())
        # A turn that came late because nothing new could be checked does not delay the next one.
        self._num_windows -= self._every
        return Turn(
            hop=hop,
            tokens=tuple(tokens[:end]),
            first_unchecked=self.checked[hop],
            signed=tuple(self._signed.at(position, hop) for position in range(end)),
        )

    async def check(self, turn: Turn) -> None:
        """Carry out a spot check.

        Raises:
            DishonestPeer: names the peer that lied.
        """
        hop = self._signed.hops[turn.hop]
        inputs, end = b"", len(turn.tokens)
        if turn.hop:
            inputs, end = await self._shown(turn, self._signed.hops[turn.hop - 1], end, is_before=True)
        row_bytes = len(inputs) // max(1, end)
        outputs = b""
        if turn.hop < len(self._signed.hops) - 1:
            outputs, end = await self._shown(turn, hop, end, is_before=False)
        if end <= turn.first_unchecked:
            return
        verdicts = []
        for replica in self._replicas(hop.span, hop.peer)[:2]:
            wrong_at = await self._differs(turn, replica, inputs[: end * row_bytes], outputs, end)
            if wrong_at is not None:
                verdicts.append((replica, wrong_at))
                if wrong_at < 0:
                    break
        self._judge(turn, verdicts, end)

    def _judge(self, turn: Turn, verdicts: list[tuple[PeerId, int]], end: int) -> None:
        """Judge the stage: it is right if one replica agrees with it, and it lied if all that answered differ."""
        hop = self._signed.hops[turn.hop]
        if not verdicts:
            self.num_unchecked += 1
            return
        self.num_checks += 1
        liars = [replica for replica, wrong_at in verdicts if wrong_at >= 0]
        if any(wrong_at < 0 for _, wrong_at in verdicts):
            self.checked[turn.hop] = max(self.checked[turn.hop], end)
            if liars:
                raise DishonestPeer(liars[0], "its recomputation differs from two others'")
            return
        position = min(wrong_at for _, wrong_at in verdicts)
        raise DishonestPeer(
            hop.peer,
            f"its output of layers {hop.span} at position {position} differs from that of {len(liars)} replica(s)",
        )

    async def _shown(self, turn: Turn, hop: Hop, end: int, *, is_before: bool) -> tuple[bytes, int]:
        """Ask a stage for the rows it sent and compare them with what it signed; return the rows and their number."""
        try:
            answer = await self._ask(PeerId(hop.peer), Reveal(session=self._session, end=end), b"")
        except PeerError as exc:
            raise DishonestPeer(hop.peer, f"it did not reveal the rows that it sent: {exc}") from exc
        message = answer.message
        assert isinstance(message, Revealed)
        num_rows = min(message.num_rows, end)
        rows = bytes(answer.payload)
        if num_rows < end - _MAX_LAG or len(rows) % max(1, message.num_rows):
            raise DishonestPeer(hop.peer, f"it revealed {num_rows} of {end} rows")
        if not num_rows:
            return b"", 0
        row_bytes = len(rows) // message.num_rows
        hashes = hash_rows(rows[: num_rows * row_bytes], row_bytes)
        for position in range(num_rows):
            mine, before, offset = turn.signed[position]
            signed = before.outputs if is_before and before else mine.outputs
            if row_hash(hashes, position) != row_hash(signed, offset):
                raise DishonestPeer(
                    hop.peer, f"the row that it revealed for position {position} does not match its signed hash"
                )
        return rows[: num_rows * row_bytes], num_rows

    async def _differs(self, turn: Turn, replica: PeerId, inputs: bytes, outputs: bytes, end: int) -> int | None:
        """Return the first unchecked position at which the replica differs: -1 if none, None without an answer."""
        hop = self._signed.hops[turn.hop]
        asked = Recompute(
            request=secrets.token_bytes(8),
            span=hop.span,
            model=self._model,
            tokens=turn.tokens[:end],
            text=self._text,
            num_prompt=min(self._num_prompt, end),
        )
        try:
            answer = await self._ask(replica, asked, inputs)
        except PeerError:
            return None
        message = answer.message
        assert isinstance(message, Recomputed)
        if message.error:
            return None
        if turn.hop == len(self._signed.hops) - 1:
            return self._first_wrong_pick(turn, message, end)
        return self._first_wrong_row(turn, bytes(answer.payload), outputs, end)

    def _first_wrong_pick(self, turn: Turn, message: Recomputed, end: int) -> int | None:
        if len(message.gaps) != end:
            return None
        for position in range(max(turn.first_unchecked, self._num_prompt - 1), end - 1):
            if message.gaps[position] > _MAX_GAP_MILLI[self._model.weights]:
                return position
        return -1

    def _first_wrong_row(self, turn: Turn, theirs: bytes, mine: bytes, end: int) -> int | None:
        if len(theirs) < len(mine) or not mine:
            return None
        claimed = to_float32(mine, self._model.compute).reshape(end, -1)
        computed = to_float32(theirs[: len(mine)], self._model.compute).reshape(end, -1)
        scale = np.linalg.norm(computed, axis=1) + 1e-6
        errors = np.linalg.norm(claimed - computed, axis=1) / scale
        wrong = np.flatnonzero(~(errors[turn.first_unchecked :] <= _TOLERANCE[self._model.weights]))
        return turn.first_unchecked + int(wrong[0]) if len(wrong) else -1
