"""One window at one stage: edits the cache, gives the rows to compute, and makes of them what is sent on."""

from collections.abc import Callable

import msgspec
import numpy as np

from dsd_p2p.cache.passes import SpanOutput, SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.session.tail import verdict_of
from dsd_p2p.stage.session import Queued, StageSession
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import StageCost, TokenId, TokenLogprobs
from dsd_p2p.verification.base import TargetView
from dsd_p2p.verification.importance import DraftOpinion
from dsd_p2p.verification.logprobs import token_logprobs
from dsd_p2p.wire.attest import hash_rows, hash_tokens, signed_text
from dsd_p2p.wire.hidden import pack, unpack
from dsd_p2p.wire.messages import (
    MAX_ATTESTED_WINDOWS,
    MAX_STAGES,
    MAX_WAITED,
    WAITED_PER_S,
    Attestation,
    DraftTop,
    Verdict,
    Window,
    WindowAttestation,
)

Answer = tuple[Window | Verdict, bytes]
"""What is sent on, and its payload."""
Cost = Callable[[], tuple[StageCost, float]]
"""What a window took at a stage, and seconds that it waited there."""


class StagePass:
    """A window's way through the model, in a worker thread: `begin`, `piece` and `take` until `num_left` is 0, `finish`.

    sign: with the peer's own key, for sessions that ask for it.
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
        """The layers it needs."""
        return self.session.model

    @property
    def num_left(self) -> int:
        """Rows to compute yet; before `begin` at most so many."""
        if not self.is_begun:
            return len(self.window.tokens)
        return 0 if self._forward is None else len(self._forward.positions) - self._num_done

    @property
    def is_stale(self) -> bool:
        """True when nobody waits for it any more. It stays wanted once begun: the cache holds part of it."""
        return not self.is_begun and (self.session.is_orphan or self.session.state.is_stale(self.window))

    def begin(self) -> None:
        """Bring the cache to where the window starts.

        Raises:
            DsdError: the window breaks a rule of the protocol or a limit.
        """
        session, window = self.session, self.window
        self._live = session.walk.live(window) if session.walk else list(range(len(window.tokens)))
        step = session.state.accept(window, self._live)
        self.is_begun = True
        if step is None:
            self.is_worth_it = False
            return
        if step.edit is not None:
            session.edit(step.edit)
        self._inputs = self._read()
        self._forward = step.forward
        if session.walk is not None:
            self._wanted = [
                row for row, offset in enumerate(self._live) if session.walk.wants_pick(window.positions[offset])
            ]
        assert session.walk is not None or step.forward is not None, "only the tail skips nodes"

    def piece(self, max_rows: int) -> SpanPass:
        """Return the pass over the next rows."""
        assert self._forward is not None, "nothing is left"
        start, end = self._num_done, min(self._num_done + max_rows, len(self._forward.positions))
        size = self.model.row_bytes if isinstance(self._inputs, bytes) else 1
        return SpanPass(
            cache=self.session.cache,
            forward=self._forward.part(start, end),
            inputs=self._inputs[start * size : end * size],
            wanted=[row - start for row in self._wanted if start <= row < end],
        )

    def take(self, done: SpanPass, output: SpanOutput) -> None:
        """Take in what came of a piece.

        Raises:
            DsdError: what is wrong with it.
        """
        if self.session.walk is None:
            self._hidden.append(hidden_of(output))
        else:
            for row, view in zip(done.wanted, views_of(output), strict=True):
                self._views[self._num_done + row] = view
        self._num_done += done.num_rows

    def finish(self, cost: Cost) -> Answer | None:
        """Return what is sent on, None for nothing. cost: what the window took here, up to the moment it is called."""
        if not self.is_worth_it:
            return None
        return self._hand_on(cost) if self.session.walk is None else self._judge(cost)

    def _hand_on(self, cost: Cost) -> Answer:
        session = self.session
        packed = pack(
            b"".join(self._hidden), session.model.row_bytes, session.opened.model.compute, session.write_format
        )
        if session.log is not None:
            session.log.append(self.window.tokens, packed)
        return self._measured(self._attested(packed), *cost()), packed

    def _judge(self, cost: Cost) -> Answer | None:
        """Walk on as far as the picks lead."""
        session, window, walk, verifier = self.session, self.window, self.session.walk, self.session.verifier
        assert walk is not None
        assert verifier is not None
        if session.opened.attest:
            window = self._attested(b"")
            session.attested.append(WindowAttestation(window=window.window, stages=window.attestations))
            del session.attested[:-MAX_ATTESTED_WINDOWS]
        if self._forward is None:
            return None
        text = session.opened.text
        tops = {top.offset: top for top in window.drafts} if text.relaxation else {}
        live = self._live
        num_relaxed = 0
        logprobs: list[TokenLogprobs] = []

        def pick(row: int) -> TokenId:
            nonlocal num_relaxed
            top = tops.get(live[row])
            token, is_relaxed = verifier.judge(self._views[row], _opinion(top) if top else None)
            verifier.accept(token)
            num_relaxed += is_relaxed
            if text.top_logprobs >= 0:
                logprobs.append(token_logprobs(self._views[row].logits(), token, text.top_logprobs))
            return token

        committed = walk.walk(window, live, pick, verifier.accept)
        if not committed.tokens:
            return None
        attested, session.attested = session.attested, []
        measured = self._measured(window, *cost())
        verdict = verdict_of(
            measured,
            committed,
            num_live=len(live),
            num_relaxed=num_relaxed,
            attestations=attested,
            logprobs=logprobs,
        )
        return verdict, b""

    def _read(self) -> list[TokenId] | bytes:
        session, window, payload = self.session, self.window, self._payload
        if session.model.is_head:
            return [window.tokens[offset] for offset in self._live]
        if len(self._live) < len(window.tokens):
            size = session.row_bytes
            payload = b"".join(payload[offset * size : (offset + 1) * size] for offset in self._live)
        return unpack(payload, session.model.row_bytes, session.opened.model.compute, session.read_format)

    def _attested(self, packed: bytes) -> Window:
        """The window with our signature under what came in and what goes out, when the session wants it."""
        session, window = self.session, self.window
        if not session.opened.attest or self._sign is None:
            return window
        inputs = hash_tokens(window.tokens) if session.model.is_head else hash_rows(self._payload, session.row_bytes)
        self._check_neighbour(inputs)
        outputs = hash_rows(packed, len(packed) // len(window.tokens)) if packed else b""
        text = signed_text(window, session.opened.route[session.index].span, inputs, outputs)
        attestation = Attestation(inputs=inputs, outputs=outputs, signature=self._sign(text))
        return msgspec.structs.replace(window, attestations=(*window.attestations, attestation)[-MAX_STAGES:])

    def _check_neighbour(self, inputs: bytes) -> None:
        """Complain at once of a stage before us that signed something else than it sent: later it would look like our doing."""
        session, signed = self.session, self.window.attestations
        if len(signed) != session.index:
            session.about = session.previous
            raise RemoteProtocolError("attestations", len(signed), f"{session.index}, one a stage before this one")
        if signed and signed[-1].outputs != inputs:
            session.about = session.previous
            raise RemoteProtocolError("attestation", "of other outputs", "of the rows that were sent")

    def _measured(self, window: Window, cost: StageCost, waited_s: float) -> Window:
        """The window with what this stage adds to its measurements."""
        return msgspec.structs.replace(
            window,
            costs=(*window.costs, cost)[-MAX_STAGES:],
            link_bytes=min(window.link_bytes + self.session.received_bytes, 1 << 62),
            waited=min(window.waited + round(waited_s * WAITED_PER_S), MAX_WAITED),
        )


def _opinion(top: DraftTop) -> DraftOpinion:
    return DraftOpinion(tokens=np.array(top.tokens, np.int64), logprobs=np.array(top.centinats, np.float64) / -100)
