"""Takes one window through a stage: edits the cache, selects the rows to compute, and builds the message to send on."""

from collections.abc import Callable

import msgspec
import numpy as np

from dsd_p2p.cache.passes import SpanOutput, SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.keys import is_signed_by, public_of
from dsd_p2p.session.tail import verdict_of
from dsd_p2p.stage.batcher import Answer, Cost
from dsd_p2p.stage.session import Queued, StageSession, Tail
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import PeerId, StageCost, TokenId, TokenLogprobs
from dsd_p2p.verification.base import TargetView
from dsd_p2p.verification.importance import DraftOpinion
from dsd_p2p.verification.logprobs import token_logprobs
from dsd_p2p.wire.attest import ALWAYS_PROBED, NO_PROBES, hash_rows, hash_tokens, probes_of, signed_text
from dsd_p2p.wire.hidden import pack, unpack
from dsd_p2p.wire.messages import (
    MAX_ATTESTED_WINDOWS,
    MAX_STAGES,
    MAX_WAITED,
    WAITED_PER_S,
    Attestation,
    DraftTop,
    Window,
    WindowAttestation,
)


class WindowPass:
    """One window's pass through the model, in a worker thread.

    Call `begin`, then `piece` and `take` until `num_left` is 0, then `finish`.
    sign: signs with the peer's own key, for sessions that ask for attestations.
    """

    def __init__(self, session: StageSession, queued: Queued, sign: Callable[[bytes], bytes] | None) -> None:
        self.session = session
        self.window = queued.window
        self.arrived_s = queued.arrived_s
        self._payload = queued.payload
        self._sign = sign
        self._live: list[int] = []
        self._forward: Forward | None = None
        self._inputs: list[TokenId] | bytes = b""
        self._num_done = 0
        self._hidden: list[bytes] = []
        self._views: dict[int, TargetView] = {}
        self._wanted: list[int] = []
        self.is_begun = False
        self.is_worth_it = True

    @property
    def model(self) -> SpanModel:
        """The layers to run."""
        return self.session.place.model

    @property
    def num_layers(self) -> int:
        """Their number."""
        return self.session.place.span.num_layers

    @property
    def owner(self) -> PeerId:
        """The session's coordinator."""
        return self.session.coordinator

    @property
    def num_left(self) -> int:
        """The number of rows still to compute; before `begin`, an upper bound."""
        if not self.is_begun:
            return len(self.window.tokens)
        return 0 if self._forward is None else len(self._forward.positions) - self._num_done

    @property
    def is_stale(self) -> bool:
        """True when nobody needs it any more. Once begun it is never stale, because the cache holds part of it."""
        return not self.is_begun and (self.session.is_orphan or self.session.held.state.is_stale(self.window))

    def begin(self) -> None:
        """Edit the cache so that the window's nodes can follow, and read the inputs.

        Raises:
            DsdError: the window breaks a rule of the protocol or a limit.
        """
        session, window = self.session, self.window
        walk = session.tail.walk if session.tail else None
        self._live = walk.live(window) if walk else list(range(len(window.tokens)))
        step = session.held.state.accept(window, self._live)
        self.is_begun = True
        if step is None:
            self.is_worth_it = False
            return
        if step.edit is not None:
            session.held.edit(step.edit)
        self._inputs = self._read()
        self._forward = step.forward
        if walk is not None:
            num_probed = ALWAYS_PROBED if session.opened.attest else 0
            positions = [window.positions[offset] for offset in self._live]
            self._wanted = [row for row, at in enumerate(positions) if walk.wants_pick(at) or at < num_probed]
        assert walk is not None or step.forward is not None, "only the tail skips nodes"

    def piece(self, max_rows: int) -> SpanPass:
        """Return the pass over the next rows."""
        assert self._forward is not None, "nothing is left"
        start, end = self._num_done, min(self._num_done + max_rows, len(self._forward.positions))
        size = self.model.row_bytes if isinstance(self._inputs, bytes) else 1
        return SpanPass(
            cache=self.session.held.cache,
            forward=self._forward.part(start, end),
            inputs=self._inputs[start * size : end * size],
            wanted=[row - start for row in self._wanted if start <= row < end],
        )

    def take(self, done: SpanPass, output: SpanOutput) -> None:
        """Store the output of a piece.

        Raises:
            DsdError: the output is an error.
        """
        if self.session.tail is None:
            self._hidden.append(hidden_of(output))
        else:
            for row, view in zip(done.wanted, views_of(output), strict=True):
                self._views[self._num_done + row] = view
        self._num_done += done.num_rows

    def finish(self, cost: Cost) -> Answer | None:
        """Return the message to send on, or None.

        cost: returns the window's cost here up to the moment of the call.
        """
        if not self.is_worth_it:
            return None
        return self._hand_on(cost) if self.session.tail is None else self._judge(cost, self.session.tail)

    def _hand_on(self, cost: Cost) -> Answer:
        place, log = self.session.place, self.session.held.log
        hidden = b"".join(self._hidden)
        packed = pack(hidden, place.model.row_bytes, place.opened.model.compute, place.write_format)
        if log is not None:
            log.append(self.window.tokens, packed)
        return self._measured(self._attested(packed), *cost()), packed

    def _judge(self, cost: Cost, tail: Tail) -> Answer | None:
        """Walk the tree as far as the picks match its nodes, and return the verdict, if any token was committed."""
        window, verifier, text = self.window, tail.verifier, self.session.opened.text
        if self.session.opened.attest:
            window = self._attested(self._probes())
            tail.attested.append(WindowAttestation(window=window.window, stages=window.attestations))
            del tail.attested[:-MAX_ATTESTED_WINDOWS]
        if self._forward is None:
            return None
        tops = {top.offset: top for top in window.drafts} if text.relaxation else {}
        live = self._live
        num_relaxed, relaxed_nats = 0, 0.0
        logprobs: list[TokenLogprobs] = []

        def pick(row: int) -> TokenId:
            nonlocal num_relaxed, relaxed_nats
            top = tops.get(live[row])
            token, is_relaxed, loss = verifier.judge(self._views[row], _opinion(top) if top else None)
            verifier.accept(token)
            num_relaxed += is_relaxed
            relaxed_nats += loss
            if text.top_logprobs >= 0:
                logprobs.append(token_logprobs(self._views[row].logits(), token, text.top_logprobs))
            return token

        committed = tail.walk.walk(window, live, pick, verifier.accept)
        if not committed.tokens:
            return None
        attested, tail.attested = tail.attested, []
        measured = self._measured(window, *cost())
        verdict = verdict_of(
            measured,
            committed,
            num_live=len(live),
            num_relaxed=num_relaxed,
            relaxed_micronats=round(1e6 * relaxed_nats),
            attestations=attested,
            logprobs=logprobs,
        )
        return verdict, b""

    def _probes(self) -> bytes:
        """Return the rows that the tail signs, one for each node, and keep those of the nodes in the cache."""
        log = self.session.held.log
        views = {offset: self._views[row] for row, offset in enumerate(self._live) if row in self._views}
        rows = [
            probes_of(views[offset].logits()) if offset in views else NO_PROBES
            for offset in range(len(self.window.tokens))
        ]
        if log is not None and self._forward is not None:
            log.append(
                [self.window.tokens[offset] for offset in self._live], b"".join(rows[each] for each in self._live)
            )
        return b"".join(rows)

    def _read(self) -> list[TokenId] | bytes:
        place, window, payload = self.session.place, self.window, self._payload
        if place.model.is_head:
            return [window.tokens[offset] for offset in self._live]
        if len(self._live) < len(window.tokens):
            size = place.read_row_bytes
            payload = b"".join(payload[offset * size : (offset + 1) * size] for offset in self._live)
        return unpack(payload, place.model.row_bytes, place.opened.model.compute, place.read_format)

    def _attested(self, packed: bytes) -> Window:
        """Return the window with our attestation of its inputs and outputs added, if the session asks for it."""
        place, window = self.session.place, self.window
        if not place.opened.attest or self._sign is None:
            return window
        is_head = place.model.is_head
        inputs = hash_tokens(window.tokens) if is_head else hash_rows(self._payload, place.read_row_bytes)
        self._check_neighbour(inputs)
        outputs = hash_rows(packed, len(packed) // len(window.tokens)) if packed else b""
        text = signed_text(window, place.span, inputs, outputs)
        attestation = Attestation(inputs=inputs, outputs=outputs, signature=self._sign(text))
        return msgspec.structs.replace(window, attestations=(*window.attestations, attestation)[-MAX_STAGES:])

    def _check_neighbour(self, inputs: bytes) -> None:
        """Refuse a window whose last attestation does not match the rows we received, or we would be blamed later."""
        place, signed = self.session.place, self.window.attestations
        if len(signed) != place.index:
            self.session.about = place.previous
            raise RemoteProtocolError("attestations", len(signed), f"{place.index}, one for each stage before this one")
        if not signed:
            return
        if signed[-1].outputs != inputs:
            self.session.about = place.previous
            raise RemoteProtocolError("attestation", "hashes of other rows", "hashes of the rows that were sent")
        text = signed_text(self.window, place.opened.route[place.index - 1].span, signed[-1].inputs, inputs)
        if not is_signed_by(public_of(place.previous), signed[-1].signature, text):
            self.session.about = place.previous
            raise RemoteProtocolError("attestation signature", "an invalid one", f"that of {place.previous}")

    def _measured(self, window: Window, cost: StageCost, waited_s: float) -> Window:
        """Return the window with this stage's measurements added."""
        return msgspec.structs.replace(
            window,
            costs=(*window.costs, cost)[-MAX_STAGES:],
            link_bytes=min(window.link_bytes + self.session.inbox.received_bytes, 1 << 62),
            waited=min(window.waited + round(waited_s * WAITED_PER_S), MAX_WAITED),
        )


def _opinion(top: DraftTop) -> DraftOpinion:
    return DraftOpinion(tokens=np.array(top.tokens, np.int64), logprobs=np.array(top.centinats, np.float64) / -100)
