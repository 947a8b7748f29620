"""The request machine: one text from prompt to last token, free of I/O.

How it works. The machine is given what happens and the time; it returns effects (`.effects`), which its driver performs in order
(`dsd_p2p.coordination.driver` on real peers, `dsd_p2p.sim.request` in virtual time). It is in one of four phases:

    NEW ──start──> OPEN ──lost, failed──> WAITING ──reopen──> OPEN
                    │                        │
                    └──── last token, stop, abort, no route ────> FINISHED (absorbing)

  OPEN      a session is open on `route`. Every call ends in `_pump`, which is the algorithm: send what may be sent, draft what may
            be drafted. A verdict commits tokens (`_apply`); one that names a token no window carries opens the next epoch.
  WAITING   the route is lost and a `Replay` effect asks for another. Verdicts and drafts of before change nothing.
  FINISHED  a `Finish` effect was returned; every call returns nothing from then on.

Who holds what: `text` the tokens and the draft tree, `drafting` the question to the drafter, `pacing` the policy's decision and
the pace, `flight` epochs, numbers and windows without a verdict, `opening` the route and what its stages hold. One thread uses all.

docs/protocol.md has the rules: 3 (Nodes) and 4 (Roots) are kept by `flight`, 7 (Misses) by `_commit`, 8 (Verdicts) by `verdicts`,
2 (Opening), 9 (Replay), 10 (Closing) and 11 (Parking) by `opening`.
"""

import math
from collections.abc import Container, Sequence
from enum import Enum, auto

from dsd_p2p.errors import (
    ConfigError,
    DsdError,
    LocalProtocolError,
    PeerTimeout,
    PrefixLost,
    RemoteProtocolError,
)
from dsd_p2p.session.drafting import Drafting
from dsd_p2p.session.effects import Candidate, Carried, Effect, Emit, Finish, Replay, Send
from dsd_p2p.session.flight import Flight
from dsd_p2p.session.growth import choose_unsent, has_unsent
from dsd_p2p.session.opening import Opening, Passed
from dsd_p2p.session.pacing import Pacing
from dsd_p2p.session.packing import draft_tops, pack_nodes
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.verdicts import check_verdict
from dsd_p2p.session.written import WrittenText
from dsd_p2p.types import PeerId, TokenId, UniformRng
from dsd_p2p.window.base import Decision, Mode, WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import WAITED_PER_S, Cancel, CloseSession, Verdict

_MAX_EARLY_VERDICTS = 64
"""Verdicts that wait for one before them; stages keep their order, so only a broken tail sends more."""


class Phase(Enum):
    """See the module's text."""

    NEW = auto()
    OPEN = auto()
    WAITING = auto()
    FINISHED = auto()


class RequestMachine:
    """One request. Call `start` once, then report what happens; stop at the `Finish` effect."""

    def __init__(self, request: Request, route: Route, policy: WindowPolicy, tracker: Tracker, rng: UniformRng) -> None:
        if not request.prompt:
            raise LocalProtocolError("a request needs at least one prompt token")
        self.phase = Phase.NEW
        self.stats = RequestStats()
        self.request = request
        self._tracker = tracker
        self._rng = rng
        self._text = WrittenText(request.prompt)
        self._drafting = Drafting(self._text, request.max_length - 1, tracker, self.stats)
        self.pacing = Pacing(policy, tracker, self.stats)
        self.flight = Flight(request.session, self.stats)
        self.opening = Opening(request, route)
        # Verdicts that start behind the text, by start: one before them is still on its way.
        self._early: dict[int, Verdict] = {}
        self._detour_s = 0.0

    def __repr__(self) -> str:
        return (
            f"<request {self.request.session.hex()} {self.phase.name}: {self._text!r}; {self.flight!r}; "
            f"{self.pacing!r}; {self._drafting!r}; {self.opening!r}>"
        )

    # What the driver reports

    def start(self, now_s: float) -> list[Effect]:
        """Open the session on the route and send the prompt."""
        self.phase = Phase.OPEN
        return [*self._open((), now_s), *self._pump(now_s)]

    def receive(self, verdict: Verdict, now_s: float) -> list[Effect]:
        """Take in a verdict; duplicates and those of an older epoch change nothing.

        Raises:
            RemoteProtocolError: it contradicts what is committed, or lies too far ahead.
        """
        if self.phase is not Phase.OPEN or verdict.epoch < self.flight.epoch:
            return []
        check_verdict(verdict, self.request, self.tokens, self.flight.epoch, self.flight.next_node)
        if len(self._early) >= _MAX_EARLY_VERDICTS:
            raise RemoteProtocolError("verdicts out of order", len(self._early), f"below {_MAX_EARLY_VERDICTS}")
        if verdict.start_pos > len(self._text):
            self._early[verdict.start_pos] = verdict
            return []
        num_before = len(self._text)
        effects = self._apply(verdict, now_s)
        while not self.is_finished and (early := self._early.pop(len(self._text), None)) is not None:
            if early.epoch == self.flight.epoch:
                effects += self._apply(early, now_s)
        if not self.is_finished:
            self.pacing.decide(len(self._text), len(self._text) - num_before, now_s)
            effects += self._pump(now_s)
        return effects

    def drafted(self, children: Sequence[Sequence[Candidate]], now_s: float) -> list[Effect]:
        """Take in the answer to the last `Draft`: for each stem its children, likeliest first."""
        if self.is_finished:
            return []
        self._drafting.take(children, self.decision, now_s)
        return self._pump(now_s)

    def lost(self, error: DsdError, now_s: float, gone: PeerId | None = None) -> list[Effect]:
        """A stage or the way to it failed: go on over another route, or finish with `error` when that is no use.

        gone: the stage whose connection is lost, if one is.
        """
        if gone is not None:
            self.opening.gone(gone)
        if self.phase is not Phase.OPEN:
            return []
        is_hopeless = isinstance(error, ConfigError | LocalProtocolError)
        num_failed = None if is_hopeless else self.opening.failed(error)
        if num_failed is None:
            return self._finish("error", error)
        self.phase = Phase.WAITING
        self.flight.clear()
        return [Replay(delay_s=self.request.retry.delay_s(num_failed, self._rng), reason=str(error))]

    def reopen(self, route: Route, now_s: float) -> list[Effect]:
        """Go on over `route` after a `Replay`: no token is emitted twice.

        Stages of both routes go on with what they hold where they can; everything else is given again.
        """
        kept, left_out = self.opening.go_over(route, len(self._text))
        close = self.opening.close_message(self.flight.epoch)
        self.phase = Phase.OPEN
        self.stats.num_replays += 1
        self.stats.num_resumes += any(kept)
        return [*(Send(to=peer, message=close) for peer in left_out), *self._open(kept, now_s), *self._pump(now_s)]

    def failed(self, epoch: int, error: DsdError, now_s: float) -> list[Effect]:
        """A stage gave up the session it had opened at `epoch`; what it says of an earlier opening is old news."""
        if self.phase is not Phase.OPEN or epoch < self.opening.epoch:
            return []
        if isinstance(error, PrefixLost) and self.opening.prefix is not None:
            self.opening.prefix = None
            return [*self._open((), now_s), *self._pump(now_s)]
        return self.lost(error, now_s)

    def route_not_found(self, error: DsdError, now_s: float) -> list[Effect]:
        """There was no route to go on with: try again later, or finish with what was wrong with the last one."""
        if self.phase is not Phase.WAITING:
            return []
        if self.opening.is_loss_final:
            return self._finish("error", self.opening.loss)
        self.phase = Phase.OPEN
        return self.lost(error, now_s)

    def wake(self, now_s: float) -> list[Effect]:
        """Send what was held back until now; give the route up if it has been silent for too long."""
        if now_s < self._stalled_at_s:
            return self._pump(now_s) if self._may_send_soon() else []
        stalled = f"no verdict for {self.request.stall_timeout_s:g} s: check the stages' logs, or raise --stall-timeout"
        return self.lost(PeerTimeout(stalled), now_s)

    def abort(self, error: DsdError) -> list[Effect]:
        """End the request: what was emitted cannot be trusted."""
        return [] if self.is_finished else self._finish("error", error)

    def stop(self) -> list[Effect]:
        """End the request early, freeing every stage's cache."""
        return [] if self.is_finished else self._finish("cancelled")

    def moved(self, detour_s: float) -> None:
        """The coordinator sits elsewhere than the drafter: a window from there would travel `detour_s` longer (fused mode)."""
        self._detour_s = detour_s

    # What the driver may ask

    @property
    def is_finished(self) -> bool:
        """True once a `Finish` effect was returned."""
        return self.phase is Phase.FINISHED

    @property
    def deadline_s(self) -> float:
        """When `wake` must be called unless something happens before."""
        is_next_send_due = self._may_send_soon() and has_unsent(self._text.tree, self.decision, self._held_back)
        return min(self._stalled_at_s, self.pacing.next_send_at_s if is_next_send_due else math.inf)

    @property
    def tokens(self) -> list[TokenId]:
        """Prompt and committed tokens."""
        return self._text.tokens

    @property
    def decision(self) -> Decision:
        """The window policy's present decision."""
        return self.pacing.decision

    @property
    def route(self) -> Route:
        """The present route."""
        return self.opening.route

    def involves(self, peer: PeerId) -> bool:
        """True when `peer` is a stage of the present route."""
        return any(hop.peer == peer for hop in self.route.hops)

    # The algorithm

    def _pump(self, now_s: float) -> list[Effect]:
        """Send what may be sent, draft what may be drafted."""
        if self.phase is not Phase.OPEN:
            return []
        decision, tree = self.decision, self._text.tree
        # In relaxed mode the tail judges by the drafter's opinion, which travels with the node: draft first, hold the stems back.
        effects: list[Effect] = [*self._drafting.ask(decision, now_s)] if self._is_draft_first else []
        # A new root leaves at once; in sync mode with all that is drafted below it.
        if tree.root.number is None and (decision.mode is not Mode.SYNC or self._drafting.is_window_full(decision)):
            effects.append(self._send_window(now_s))
        # Below it, a window each time the pace allows one.
        while (
            self._may_send_soon()
            and now_s >= self.pacing.next_send_at_s
            and has_unsent(tree, decision, self._held_back)
        ):
            effects.append(self._send_window(now_s))
        return [*effects, *self._drafting.ask(decision, now_s)]

    @property
    def _is_draft_first(self) -> bool:
        return self.request.is_relaxed and self.decision.mode is Mode.CONTINUOUS

    @property
    def _held_back(self) -> Container[int]:
        """Keys of nodes that wait for the drafter's answer before they are sent; never the root."""
        return self._drafting.asked_keys if self._is_draft_first else ()

    def _may_send_soon(self) -> bool:
        """True when nothing but the pace holds the next window back."""
        tree = self._text.tree
        is_root_sent = self.phase is Phase.OPEN and tree.root.number is not None
        return is_root_sent and self.pacing.may_send(len(self.flight), tree.num_sent)

    @property
    def _stalled_at_s(self) -> float:
        is_waiting = self.phase is Phase.OPEN and len(self.flight) > 0
        return self.flight.progress_at_s + self.request.stall_timeout_s if is_waiting else math.inf

    def _send_window(self, now_s: float) -> Send:
        """Send the likeliest unsent nodes whose parents are sent, the root first."""
        tree, flight = self._text.tree, self.flight
        nodes = choose_unsent(tree, self.decision, self.decision.window_nodes, self._held_back)
        assert tree.root.number is not None or nodes[0] is tree.root
        first_node = flight.next_node
        for node in nodes:
            tree.send(node, flight.next_node)
            if node.parent is not None:
                self.stats.sent_by_source[node.source] = self.stats.sent_by_source.get(node.source, 0) + 1
            flight.next_node += 1
        drafts = draft_tops(nodes) if self.request.is_relaxed else ()
        window = flight.window(*pack_nodes(nodes, first_node), first_node, now_s, drafts)
        if tree.root is nodes[0]:
            flight.root = (flight.epoch, first_node)
        self._drafting.window_sent()
        self.pacing.sent(now_s)
        return Send(to=self.route.head, message=window)

    # Verdicts

    def _apply(self, verdict: Verdict, now_s: float) -> list[Effect]:
        """Commit the verdict's new tokens one by one; raise the epoch at the one no window carries."""
        self._measure(verdict, now_s)
        effects: list[Effect] = []
        emitted: list[TokenId] = []
        num_known = len(self._text) - verdict.start_pos

        def emit() -> Emit:
            logprobs = verdict.logprobs[num_known : num_known + len(emitted)]
            return Emit(tokens=tuple(emitted), logprobs=logprobs)

        for token in verdict.tokens[num_known:]:
            carried = self._commit(token)
            effects += carried or ()
            emitted.append(token)
            if token in self.request.text.stop_tokens:
                return [*effects, emit(), *self._finish("stop")]
            if len(self._text) >= self.request.max_length:
                return [*effects, emit(), *self._finish("length")]
            if carried is None:
                # A miss: the target's own token is the first node of a new epoch; what is drafted below it stays.
                self.stats.num_misses += 1
                self._raise_epoch()
                if len(verdict.tokens) + verdict.start_pos > len(self._text):
                    raise RemoteProtocolError("verdict tokens", verdict.tokens, "none after one that was never sent")
        if not emitted:
            return []
        self.flight.progress_at_s = now_s
        self.opening.progressed()
        if self.stats.first_token_at_s is None:
            self.stats.first_token_at_s = now_s
        effects.append(emit())
        if self._text.tree.root.number is None and len(self.flight):
            effects += self._to_stages(self.flight.cancel())
            self.flight.clear()
        return effects

    def _measure(self, verdict: Verdict, now_s: float) -> None:
        stats = self.stats
        stats.link_bytes = max(stats.link_bytes, verdict.link_bytes)
        stats.num_relaxed_tokens += verdict.num_relaxed
        if not self.flight.landed(verdict, now_s):
            return
        self.pacing.measured()
        self._tracker.verdict(
            traversal_s=self.flight.traversal_s + self._detour_s,
            costs=verdict.costs,
            waited_s=verdict.waited / WAITED_PER_S,
        )
        stats.num_verdicts += 1
        stats.add_stage_s([cost.us / 1e6 for cost in verdict.costs])
        stats.num_stale_nodes += verdict.num_stale

    def _commit(self, token: TokenId) -> list[Carried] | None:
        """Move the root to `token`. None: no window carries it; else what an auditor wants to know of it."""
        old_root = self._text.tree.root
        if old_root.number is not None:
            self.opening.passed = Passed(epoch=self.flight.epoch, node=old_root.number, position=old_root.position)
        hit = self._text.commit(token)
        if old_root.candidates:
            ranks = (rank for rank, (candidate, _) in enumerate(old_root.candidates) if candidate == token)
            self._tracker.outcome(next(ranks, None), [logprob for _, logprob in old_root.candidates])
            self.stats.outcome(
                depth=old_root.depth + 1, rank=hit.rank if hit else None, source=hit.source if hit else ""
            )
        if hit is None or hit.number is None:
            return None
        self.flight.root = (self.flight.epoch, hit.number)
        if not self.request.attest:
            return []
        return [Carried(position=hit.position, epoch=self.flight.epoch, node=hit.number)]

    def _raise_epoch(self) -> None:
        self.flight.raise_epoch()
        self._early.clear()
        self._text.tree.forget_sent()

    # Opening, closing

    def _open(self, kept: tuple[bool, ...], now_s: float) -> list[Effect]:
        """Open the session in a new epoch, and give the stages the text up to the root's parent."""
        flight, opening = self.flight, self.opening
        self._raise_epoch()
        flight.opened(now_s)
        given, message = self.tokens[:-1], opening.open_message(flight.epoch, len(self._text), kept)
        effects: list[Effect] = [Send(to=self.route.head, message=message)]
        # A head that kept the session has the text; it refills whoever has not, in windows whose numbers are left free.
        if kept and kept[0]:
            flight.held(len(given))
            flight.skip_refill(len(given))
            return effects
        # Otherwise all of it is sent, in chunks, except what the stages have parked.
        num_held = opening.prefix.num_tokens if opening.prefix is not None else 0
        flight.held(num_held)
        self.stats.num_prefix_tokens = num_held
        for start in range(num_held, len(given), self.request.prefill_chunk):
            tokens = given[start : start + self.request.prefill_chunk]
            positions = range(start, start + len(tokens))
            window = flight.window(tokens, [pos - 1 for pos in positions], positions, start, now_s)
            effects.append(Send(to=self.route.head, message=window))
            flight.held(start + len(tokens))
        self.pacing.opened(len(flight))
        self.stats.num_prefill_tokens += len(given) - num_held
        return effects

    def _finish(self, reason: str, error: DsdError | None = None) -> list[Effect]:
        self.phase = Phase.FINISHED
        if error is None and reason != "cancelled":
            self.opening.park_text()
        self.flight.clear()
        close = self.opening.close_message(self.flight.epoch)
        return [*self._to_stages(close), Finish(reason=reason, error=error)]

    def _to_stages(self, message: Cancel | CloseSession) -> list[Send]:
        return [Send(to=PeerId(hop.peer), message=message) for hop in self.route.hops]
