"""Records what the stages of a route signed for each window, and which of its nodes were committed."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsd_p2p.errors import DishonestPeer
from dsd_p2p.keys import is_signed_by, public_of
from dsd_p2p.wire.attest import hash_tokens, signed_text
from dsd_p2p.wire.messages import ROW_HASH_BYTES, Attestation, Hop, Verdict, Window

_MAX_WINDOWS_KNOWN = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    window: Window
    stages: tuple[Attestation, ...] = ()


class SignedWindows:
    """The windows sent since an attested session was last opened. hops: its stages, head first."""

    def __init__(self, hops: tuple[Hop, ...]) -> None:
        self.hops = hops
        self._sent: dict[int, _Sent] = {}
        # The (window, offset) in which each node was sent, by (epoch, node); and the same for each committed position.
        self._at: dict[tuple[int, int], tuple[int, int]] = {}
        self._path: dict[int, tuple[int, int]] = {}
        self._num_complete = 0
        self._first_epoch: int | None = None

    def sent(self, window: Window, num_committed: int) -> None:
        """Note that a window is sent; its nodes at positions below `num_committed` are committed."""
        self._sent[window.window] = _Sent(window=window)
        if self._first_epoch is None:
            self._first_epoch = window.epoch
        while len(self._sent) > _MAX_WINDOWS_KNOWN:
            del self._sent[next(iter(self._sent))]
        for offset, position in enumerate(window.positions):
            self._at[window.epoch, window.first_node + offset] = (window.window, offset)
            if position < num_committed:
                self._path[position] = (window.window, offset)

    def heard(self, verdict: Verdict) -> None:
        """Check and store the stages' signatures that a verdict of the tail carries.

        Raises:
            DishonestPeer: names the stage whose signed rows differ from its neighbour's, that did not sign, or that
                gave a verdict on a window that was not sent.
        """
        if self._first_epoch is None or verdict.epoch < self._first_epoch:
            # It answers a window of the route before.
            return
        for attested in verdict.attestations:
            sent = self._sent.get(attested.window)
            if sent is not None and not sent.stages:
                self._check_stages(sent.window, attested.stages)
                self._sent[attested.window] = _Sent(window=sent.window, stages=attested.stages)
        known = self._sent.get(verdict.window)
        if known is None:
            raise DishonestPeer(self.hops[-1].peer, f"its verdict is on window {verdict.window}, which was not sent")
        if not known.stages:
            raise DishonestPeer(self.hops[-1].peer, "its verdict lacks the stages' signatures")

    def committed(self, position: int, epoch: int, node: int) -> None:
        """Note which sent node holds the committed token at `position`."""
        at = self._at.get((epoch, node))
        if at is not None:
            self._path[position] = at

    def num_complete(self) -> int:
        """Return the number of leading positions whose windows are all signed."""
        while (at := self._path.get(self._num_complete)) is not None and self._stages_of(at[0]):
            self._num_complete += 1
        return self._num_complete

    def at(self, position: int, hop: int) -> tuple[Attestation, Attestation | None, int]:
        """Return what stage number `hop` and the one before it signed for a committed position.

        The second is None at the head. The third is the position's offset in its window.
        """
        window, offset = self._path[position]
        stages = self._stages_of(window)
        return stages[hop], stages[hop - 1] if hop else None, offset

    def _stages_of(self, window: int) -> tuple[Attestation, ...]:
        sent = self._sent.get(window)
        return sent.stages if sent else ()

    def _check_stages(self, window: Window, stages: Sequence[Attestation]) -> None:
        if len(stages) != len(self.hops):
            raise DishonestPeer(self.hops[-1].peer, f"{len(stages)} of {len(self.hops)} stages signed a window")
        expected = hash_tokens(window.tokens)
        for index, (hop, stage) in enumerate(zip(self.hops, stages, strict=True)):
            text = signed_text(window, hop.span, stage.inputs, stage.outputs)
            if not is_signed_by(public_of(hop.peer), stage.signature, text):
                raise DishonestPeer(hop.peer, "its signature on a window is invalid")
            if stage.inputs != expected:
                before = f"the output that {self.hops[index - 1].peer} signed" if index else "the tokens that were sent"
                raise DishonestPeer(hop.peer, f"the input that it signed differs from {before}")
            is_tail = index == len(self.hops) - 1
            if len(stage.outputs) != (0 if is_tail else len(window.tokens) * ROW_HASH_BYTES):
                raise DishonestPeer(hop.peer, "it signed outputs for the wrong number of nodes")
            expected = stage.outputs
