"""Records what the stages of a route signed for each window, and which of its nodes were committed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsd_p2p.errors import AuditIncomplete, DishonestPeer
from dsd_p2p.keys import is_signed_by, public_of
from dsd_p2p.types import short_peer
from dsd_p2p.wire.attest import hash_rows, hash_tokens, row_hash, signed_text
from dsd_p2p.wire.messages import ROW_HASH_BYTES, Attestation, Hop, Verdict, Window

_MAX_WINDOWS_KNOWN = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    window: Window
    stages: tuple[Attestation, ...] = ()


@dataclass(slots=True)
class Shown:
    """The rows of positions 0 to `num_rows`, as a stage has shown them."""

    rows: bytearray = field(default_factory=bytearray)
    num_rows: int = 0

    @property
    def row_bytes(self) -> int:
        """The size of a row; 0 before the first."""
        return len(self.rows) // max(1, self.num_rows)

    def add(self, rows: bytes, num_rows: int) -> None:
        """Add the rows of the next positions."""
        self.rows += rows
        self.num_rows += num_rows

    def first(self, num_rows: int) -> bytes:
        """Return the rows of the first positions."""
        return bytes(self.rows[: num_rows * self.row_bytes])


class SignedWindows:
    """The windows sent since an attested session was last opened. hops: its stages, head first.

    shown: for each stage, what it has shown of its rows.
    """

    def __init__(self, hops: tuple[Hop, ...]) -> None:
        self.hops = hops
        self._sent: dict[int, _Sent] = {}
        # The (window, offset) in which each node was sent, by (epoch, node); and the same for each committed position.
        self._at: dict[tuple[int, int], tuple[int, int]] = {}
        self._path: dict[int, tuple[int, int]] = {}
        self._nodes: list[tuple[int, int]] = []
        self._hashes = [bytearray() for _ in hops]
        self.shown = [Shown() for _ in hops]
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
            AuditIncomplete: a signature is invalid; names the tail that passed it on.
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
        """Return the number of leading positions whose windows are all signed, and keep their hashes."""
        while (at := self._path.get(len(self._nodes))) is not None and (stages := self._stages_of(at[0])):
            number, offset = at
            window = self._sent[number].window
            for hashes, stage in zip(self._hashes, stages, strict=True):
                hashes += row_hash(stage.outputs, offset)
            self._nodes.append((window.epoch, window.first_node + offset))
        return len(self._nodes)

    def node_at(self, position: int) -> tuple[int, int]:
        """Return the node (epoch, number) at a complete position."""
        return self._nodes[position]

    def is_signed_by(self, hop: int, start: int, rows: bytes, row_bytes: int) -> bool:
        """Return whether these are the rows that stage number `hop` signed for the complete positions from `start` on."""
        hashes = hash_rows(rows, row_bytes) if row_bytes else b""
        signed = self._hashes[hop][start * ROW_HASH_BYTES : start * ROW_HASH_BYTES + len(hashes)]
        return len(hashes) > 0 and hashes == bytes(signed)

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
                # Each stage checks its neighbour's. Who spoiled this one, or let it pass, cannot be told.
                tail = self.hops[-1].peer
                raise AuditIncomplete(f"a signature of {short_peer(hop.peer)} came spoiled out of the route", tail)
            if stage.inputs != expected:
                before = f"the output that {self.hops[index - 1].peer} signed" if index else "the tokens that were sent"
                raise DishonestPeer(hop.peer, f"the input that it signed differs from {before}")
            if len(stage.outputs) != len(window.tokens) * ROW_HASH_BYTES:
                raise DishonestPeer(hop.peer, "it signed outputs for the wrong number of nodes")
            expected = stage.outputs
