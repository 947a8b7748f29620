"""The logic of one request, from the prompt to the last token, free of I/O.

How it works. The driver reports each event to the machine, with the time. The machine returns effects (`.effects`),
which the driver performs in order (`dsd_p2p.coordination.driver` on real peers, `dsd_p2p.sim.request` in virtual time).
The machine is in one of four phases:

    NEW ──start──> OPEN ──lost, failed──> WAITING ──reopen──> OPEN
                    │                        │
                    └──── last token, stop, abort, no route ────> FINISHED (absorbing)

  OPEN      A session is open on `route`. Nearly every call ends in `_pump`, which is the algorithm: send the windows
            and ask for the drafts that are allowed now. A verdict commits tokens (`_apply`). A committed token that no
            window carries opens the next epoch.
  WAITING   The route is lost, and a `Replay` effect asks for another. Late verdicts change nothing. A late draft still
            joins the tree, but nothing is sent.
  FINISHED  A `Finish` effect was returned. The driver stops; late reports return nothing.

The state is divided: `text` holds the tokens and the draft tree, `drafting` the question to the drafter, `pacing` the
policy's decision and the pace, `flight` the epochs, numbers and windows in flight, and `opening` the route and what its
stages hold. One thread uses all of it.

docs/protocol.md has the rules. `flight` keeps rules 3 (Nodes) and 4 (Roots), `_apply` rule 7 (Misses), `verdicts` rule
8 (Verdicts), and `opening` rules 2 (Opening), 9 (Replay), 10 (Closing) and 11 (Parking).
"""

import math
from collections.abc import Container, Sequence
from enum import Enum, auto

from dsd_p2p.errors import ConfigError, DsdError, LocalProtocolError, PeerTimeout, PrefixLost, RemoteProtocolError
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
"""Most verdicts that may wait for an earlier one. Stages keep their order, so only a broken tail sends more."""


class Phase(Enum):
    """The phase of a request; see the module docstring."""

    NEW = auto()
    OPEN = auto()
    WAITING = auto()
    FINISHED = auto()


class RequestMachine:
    """The logic of one request. Call `start` once, then report each event; stop at the `Finish` effect."""

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
        # Verdicts that start past the end of the text, by start position; an earlier verdict is still on its way.
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
        """Process a verdict; duplicates and verdicts of an older epoch commit nothing.

        Raises:
            RemoteProtocolError: the verdict contradicts the committed text or the request, or too many wait for an
                earlier one.
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
        """Process the answer to the last `Draft`: for each stem, its children, likeliest first."""
        if self.is_finished:
            return []
        self._drafting.take(children, self.decision, now_s)
        return self._pump(now_s)

    def lost(self, error: DsdError, now_s: float, gone: PeerId | None = None) -> list[Effect]:
        """Handle a failed stage or link: ask for another route, or finish with `error` if that cannot help.

        gone: the stage whose connection is lost, if any.
        """
        if gone is not None:
            self.opening.gone(gone)
        if self.phase is not Phase.OPEN:
            return []
        num_failed = None if isinstance(error, ConfigError | LocalProtocolError) else self.opening.failed(error)
        if num_failed is None:
            return self._finish("error", error)
        self.phase = Phase.WAITING
        self.flight.clear()
        return [Replay(delay_s=self.request.retry.delay_s(num_failed, self._rng), reason=str(error))]

    def reopen(self, route: Route, now_s: float) -> list[Effect]:
        """Go on over `route` after a `Replay`: stages of both routes keep what they can, the others get the text again."""
        kept, left_out = self.opening.go_over(route, len(self._text))
        close = self.opening.close_message(self.flight.epoch)
        self.phase = Phase.OPEN
        self.stats.num_replays += 1
        self.stats.num_resumes += any(kept)
        return [*(Send(to=peer, message=close) for peer in left_out), *self._open(kept, now_s), *self._pump(now_s)]

    def failed(self, epoch: int, error: DsdError, now_s: float) -> list[Effect]:
        """Handle a stage that gave up the session that it opened at `epoch`; ignore reports on an earlier opening."""
        if self.phase is not Phase.OPEN or epoch < self.opening.epoch:
            return []
        if isinstance(error, PrefixLost) and self.opening.prefix is not None:
            self.opening.prefix = None
            return [*self._open((), now_s), *self._pump(now_s)]
        return self.lost(error, now_s)

    def route_not_found(self, error: DsdError, now_s: float) -> list[Effect]:
        """Handle a failed search for a route: try again later, or finish if the last error is final."""
        if self.phase is not Phase.WAITING:
            return []
        if self.opening.is_loss_final:
            return self._finish("error", self.opening.loss)
        self.phase = Phase.OPEN
        return self.lost(error, now_s)

    def wake(self, now_s: float) -> list[Effect]:
        """Send the windows that the pace held back until now; give up the route if it has been silent for too long."""
        if now_s < self._stalled_at_s:
            return self._pump(now_s) if self._may_send_soon() else []
        stalled = f"no verdict for {self.request.stall_timeout_s:g} s: check the stages' logs, or raise --stall-timeout"
        return self.lost(PeerTimeout(stalled), now_s)

    def abort(self, error: DsdError) -> list[Effect]:
        """End the request with an error, because the emitted tokens cannot be trusted."""
        return [] if self.is_finished else self._finish("error", error)

    def stop(self) -> list[Effect]:
        """End the request early, freeing every stage's cache."""
        return [] if self.is_finished else self._finish("cancelled")

    def moved(self, detour_s: float) -> None:
        """Set the extra travel time that a window would have if sent from the drafter's machine (fused mode)."""
        self._detour_s = detour_s

    # What the driver may ask

    @property
    def is_finished(self) -> bool:
        """True once the machine has returned a `Finish` effect."""
        return self.phase is Phase.FINISHED

    @property
    def deadline_s(self) -> float:
        """The time at which to call `wake` unless another event comes first."""
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
        """Return True if `peer` is a stage of the present route."""
        return any(hop.peer == peer for hop in self.route.hops)

    # The algorithm

    def _pump(self, now_s: float) -> list[Effect]:
        """Return the windows that may be sent and the draft that may be asked for now."""
        if self.phase is not Phase.OPEN:
            return []
        decision, tree = self.decision, self._text.tree
        # In relaxed mode the tail judges by the drafter's candidates, which travel with their node. So draft first, and
        # hold the stems back until the answer comes.
        effects: list[Effect] = [*self._drafting.ask(decision, now_s)] if self._is_draft_first else []
        # Send a new root at once; in sync mode, wait until the tree below it is drafted.
        if tree.root.number is None and (decision.mode is not Mode.SYNC or self._drafting.is_window_full(decision)):
            effects.append(self._send_window(now_s))
        # Below a sent root, send a window each time the pace allows.
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
        """Keys of nodes that are not sent until the drafter answers; an unsent root is sent regardless."""
        return self._drafting.asked_keys if self._is_draft_first else ()

    def _may_send_soon(self) -> bool:
        """Return True if only the pace holds back the next window."""
        tree = self._text.tree
        is_root_sent = self.phase is Phase.OPEN and tree.root.number is not None
        return is_root_sent and self.pacing.may_send(len(self.flight), tree.num_sent)

    @property
    def _stalled_at_s(self) -> float:
        is_waiting = self.phase is Phase.OPEN and len(self.flight) > 0
        patience_s = self.request.stall_timeout_s + self.flight.patience_s
        return self.flight.progress_at_s + patience_s if is_waiting else math.inf

    def _send_window(self, now_s: float) -> Send:
        """Return the effect that sends the likeliest unsent nodes, parents first; an unsent root comes first."""
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
        """Commit the verdict's new tokens one by one; begin a new epoch after a token that no window carries."""
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
                # A miss: the committed token becomes the first node of a new epoch; nodes drafted below it stay.
                self.stats.num_misses += 1
                self._raise_epoch()
                if len(verdict.tokens) + verdict.start_pos > len(self._text):
                    raise RemoteProtocolError(
                        "verdict tokens", verdict.tokens, "no token after one that was never sent"
                    )
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
        stats.relaxed_nats += verdict.relaxed_micronats / 1e6
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
        """Move the root to `token`. Return None if no window carries it, else any effects for an auditor."""
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
        """Open the session in a new epoch and give the stages the text up to the token before the root."""
        flight, opening = self.flight, self.opening
        self._raise_epoch()
        flight.opened(now_s)
        given, message = self.tokens[:-1], opening.open_message(flight.epoch, len(self._text), kept)
        effects: list[Effect] = [Send(to=self.route.head, message=message)]
        # A stage that kept the session refills the next one that did not, in windows whose numbers are left free.
        if kept:
            flight.skip_refill(len(given))
        if kept and kept[0]:
            flight.held(len(given))
            return effects
        # A head without the session receives the text in chunks, except the beginning that the stages have parked.
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
