"""The coordinator machine: one request from prompt to last token, free of I/O (docs/protocol.md, rules 1, 3, 5 and 7).

Each method takes what happened and the time, and returns the effects to perform in order. `_pump` is the algorithm.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from dsd_p2p.errors import (
    ConfigError,
    DsdError,
    LocalProtocolError,
    PeerError,
    PeerTimeout,
    PrefixLost,
    RemoteProtocolError,
)
from dsd_p2p.session.effects import NUM_CANDIDATES, Candidate, Draft, Effect, Emit, Finish, Replay, Send, Stem
from dsd_p2p.session.growth import choose_stems, choose_unsent, has_unsent
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.tree import DraftNode, DraftTree
from dsd_p2p.types import PeerId, TokenId, UniformRng
from dsd_p2p.window.base import Mode, Observation, WindowPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import (
    BASE,
    FILL_NODES,
    MAX_DRAFT_TOP,
    WAITED_PER_S,
    Cancel,
    CloseSession,
    DraftTop,
    OpenSession,
    Park,
    Verdict,
    Window,
)

_MAX_EARLY_VERDICTS = 64
_UNMEASURED_IN_FLIGHT = 3
"""Windows behind the given text while no stage's pace is known: more could only queue, and delay better ones until the end."""

_TREE_NODES_PER_SENT = 3
"""Nodes kept below the root for each that may be sent: what is unlikely now may be likely once the root has moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    window: int
    num_nodes: int
    sent_at_s: float


class Coordinator:
    """One request. Call `start` once, then report what happens; stop at the `Finish` effect.

    route: the present chain of stages.
    carried: committed tokens that a window carried already, as (position, epoch, node); whoever audits the stages takes them out.
    detour_s: what a window would travel longer from where drafts are made, while the coordinator is not there.
    prefix: what of the prompt the stages have parked, as far as is known. parked: what they were told to park.
    """

    def __init__(self, request: Request, route: Route, policy: WindowPolicy, tracker: Tracker, rng: UniformRng) -> None:
        if not request.prompt:
            raise LocalProtocolError("a request needs at least one prompt token")
        self._request = request
        self.route = route
        self._policy = policy
        self._tracker = tracker
        self._rng = rng
        self.tokens: list[TokenId] = list(request.prompt)
        self._keys = list(range(len(self.tokens)))
        self._tree = DraftTree(token=self.tokens[-1], position=len(self.tokens) - 1, key=self._keys[-1])
        self.stats = RequestStats()
        observation = tracker.observe()
        self.decision = policy.decide(observation)
        self._committed_at_s = 0.0
        self._num_unattributed = 1
        self._is_measured = bool(observation.stages)
        self._max_unmeasured = 0
        self._pace_s = observation.pace_s(self.decision.window_nodes)
        self._next_send_at_s = 0.0
        self._num_round_steps = 0
        self._epoch = -1
        self._opened_epoch = 0
        self._next_node = 0
        self._next_window = 0
        self._wire_root = (0, BASE)
        self._in_flight: list[_InFlight] = []
        self.traversal_s = 0.0
        self.detour_s = 0.0
        self._early: dict[int, Verdict] = {}
        self._drafting: dict[int, DraftNode] | None = None
        self._draft_started_s = 0.0
        self._num_failed_attempts = 0
        self._progress_at_s = 0.0
        self._is_waiting_for_chain = False
        self._loss: DsdError | None = None
        self._gone: set[str] = set()
        self._passed: tuple[int, int, int] | None = None
        self.carried: list[tuple[int, int, int]] = []
        self.prefix = request.prefix
        self.parked: Park | None = None
        self.is_finished = False

    # What the driver reports

    def start(self, now_s: float) -> list[Effect]:
        """Open the session on the route and send the prompt."""
        return [*self._open(now_s, ()), *self._pump(now_s)]

    def receive(self, verdict: Verdict, now_s: float) -> list[Effect]:
        """Take in a verdict; duplicates and those of an older epoch change nothing.

        Raises:
            RemoteProtocolError: it contradicts what is committed, or lies too far ahead.
        """
        if self.is_finished or self._is_waiting_for_chain or verdict.epoch < self._epoch:
            return []
        self._check(verdict)
        if verdict.start_pos > len(self.tokens):
            self._early[verdict.start_pos] = verdict
            return []
        num_before = len(self.tokens)
        effects = self._apply(verdict, now_s)
        while not self.is_finished and (early := self._early.pop(len(self.tokens), None)) is not None:
            if early.epoch == self._epoch:
                effects += self._apply(early, now_s)
        if not self.is_finished:
            self._decide(now_s, len(self.tokens) - num_before)
            effects += self._pump(now_s)
        return effects

    def drafted(self, children: Sequence[Sequence[Candidate]], now_s: float) -> list[Effect]:
        """Take in the answer to the last `Draft`: for each stem its children, likeliest first."""
        if self.is_finished or self._drafting is None:
            return []
        stems, self._drafting = self._drafting, None
        num_levels = max(map(_num_levels, children), default=1)
        self._num_round_steps += num_levels - 1
        if self.stats.num_draft_steps:
            # The first one reads the prompt as well, and tells nothing of the others.
            self._tracker.draft_step(len(stems), (now_s - self._draft_started_s) / num_levels)
        self.stats.num_draft_steps += num_levels
        self.stats.draft_s += now_s - self._draft_started_s
        for (key, node), candidates in zip(stems.items(), children, strict=True):
            if self._tree.get(key) is node:
                self._grow(node, candidates)
        self._tree.shed(_TREE_NODES_PER_SENT * max(self.decision.max_nodes, self.decision.depth))
        return self._pump(now_s)

    def lost(self, error: DsdError, now_s: float) -> list[Effect]:
        """A stage or the way to it failed: go on over another chain, or finish with `error` when that is no use."""
        if self.is_finished or self._is_waiting_for_chain:
            return []
        is_hopeless = isinstance(error, ConfigError | LocalProtocolError)
        if is_hopeless or self._num_failed_attempts >= self._request.retry.max_attempts:
            return self._finish("error", error)
        delay_s = self._request.retry.delay_s(self._num_failed_attempts, self._rng)
        self._num_failed_attempts += 1
        self._loss = error
        self._is_waiting_for_chain = True
        self._in_flight.clear()
        return [Replay(delay_s=delay_s, reason=str(error))]

    def gone(self, peer: PeerId) -> None:
        """A stage's connection is lost, and with it whatever it held of the session, should it come back."""
        self._gone.add(peer)

    def reopen(self, route: Route, now_s: float) -> list[Effect]:
        """Go on over `route` after a `Replay`: no token is emitted twice.

        Stages of both chains go on with what they hold where they can (docs/protocol.md, rule 9); everything else is given again.
        """
        kept = self._kept(route)
        self.prefix = None
        gone = [hop for hop in self.route.hops if hop.peer not in {hop.peer for hop in route.hops}]
        effects: list[Effect] = [Send(to=PeerId(hop.peer), message=self._close_message()) for hop in gone]
        self.route = route
        self._gone.clear()
        self._is_waiting_for_chain = False
        self.stats.num_replays += 1
        self.stats.num_resumes += any(kept)
        return [*effects, *self._open(now_s, kept), *self._pump(now_s)]

    def _kept(self, route: Route) -> tuple[bool, ...]:
        """Which stages of the new route can go on with what they hold; empty when all is given again."""
        is_sound = isinstance(self._loss, PeerError) and not isinstance(self._loss, RemoteProtocolError)
        is_first_try = self._num_failed_attempts <= 1
        # A refilled stage's own passes would be seen by nobody.
        is_sound = is_sound and not self._request.attest
        if not is_sound or not is_first_try or self._passed is None or self._passed[2] != len(self.tokens) - 2:
            return ()
        held = {(hop.peer, hop.span) for hop in self.route.hops if hop.peer not in self._gone}
        kept = tuple((hop.peer, hop.span) in held for hop in route.hops)
        return kept if any(kept) else ()

    def failed(self, epoch: int, error: DsdError, now_s: float) -> list[Effect]:
        """A stage gave up the session it had opened at `epoch`; what it says of an earlier opening is old news."""
        if self.is_finished or self._is_waiting_for_chain or epoch < self._opened_epoch:
            return []
        if isinstance(error, PrefixLost) and self.prefix is not None:
            self.prefix = None
            return [*self._open(now_s, ()), *self._pump(now_s)]
        return self.lost(error, now_s)

    def chain_not_found(self, error: DsdError, now_s: float) -> list[Effect]:
        """There was no chain to go on with: try again later, or finish.

        What another try of the same stages would not mend (no room, a broken model) ends the request with its own error.
        """
        self._is_waiting_for_chain = False
        loss = self._loss
        if loss is not None and (not isinstance(loss, PeerError) or isinstance(loss, RemoteProtocolError)):
            return self._finish("error", loss)
        return self.lost(error, now_s)

    def involves(self, peer: PeerId) -> bool:
        """True when `peer` is a stage of the present route."""
        return any(hop.peer == peer for hop in self.route.hops)

    def observe(self) -> Observation:
        """Return what the window policy decides by."""
        return self._tracker.observe()

    @property
    def num_in_flight(self) -> int:
        """Windows without a verdict."""
        return len(self._in_flight)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the text began with."""
        return len(self._request.prompt)

    @property
    def is_relaxed(self) -> bool:
        """True when the target's own token may be passed over."""
        return self._request.text.relaxation is not None

    @property
    def deadline_s(self) -> float:
        """When `wake` must be called unless something happens before."""
        is_next_send_due = self._may_send_soon() and has_unsent(self._tree, self.decision, self._held)
        return min(self._stalled_at_s, self._next_send_at_s if is_next_send_due else math.inf)

    @property
    def _stalled_at_s(self) -> float:
        is_waiting = bool(self._in_flight) and not self._is_waiting_for_chain and not self.is_finished
        return self._progress_at_s + self._request.stall_timeout_s if is_waiting else math.inf

    def wake(self, now_s: float) -> list[Effect]:
        """Send what was held back until now; give the chain up if it has been silent for too long."""
        if now_s < self._stalled_at_s:
            return self._pump(now_s) if self._may_send_soon() else []
        return self.lost(
            PeerTimeout(
                f"no verdict for {self._request.stall_timeout_s:g} s: check the stages' logs, or raise --stall-timeout"
            ),
            now_s,
        )

    def abort(self, error: DsdError) -> list[Effect]:
        """End the request: what was emitted cannot be trusted."""
        return [] if self.is_finished else self._finish("error", error)

    def stop(self) -> list[Effect]:
        """End the request early, freeing every stage's cache."""
        return [] if self.is_finished else self._finish("cancelled")

    # The algorithm

    def _pump(self, now_s: float) -> list[Effect]:
        """Send what may be sent, draft what may be drafted."""
        if self._is_waiting_for_chain:
            return []
        decision, tree = self.decision, self._tree
        # In relaxed mode the tail judges by the drafter's opinion, which travels with the node: draft first, hold the stems back.
        effects = self._draft(now_s) if self._is_draft_first else []
        if tree.root.number is None and (decision.mode is not Mode.SYNC or self._is_drafted_full()):
            effects += self._send_window(now_s)
        while self._may_send_soon() and now_s >= self._next_send_at_s and has_unsent(tree, decision, self._held):
            effects += self._send_window(now_s)
        return effects + self._draft(now_s)

    @property
    def _is_draft_first(self) -> bool:
        return self.is_relaxed and self.decision.mode is Mode.CONTINUOUS

    @property
    def _held(self) -> Container[int]:
        """Keys of nodes that wait for the drafter's answer before they are sent; never the root."""
        return self._drafting if self._is_draft_first and self._drafting else ()

    def _may_send_soon(self) -> bool:
        """True when nothing but the pace holds the next window back."""
        decision = self.decision
        return (
            decision.mode is Mode.CONTINUOUS
            and not self._is_waiting_for_chain
            and not self.is_finished
            and self._tree.root.number is not None
            and len(self._in_flight) < decision.max_in_flight
            and (self._is_measured or len(self._in_flight) < self._max_unmeasured)
            and self._tree.num_sent + decision.window_nodes <= decision.max_nodes
        )

    def _is_drafted_full(self) -> bool:
        """True when a synchronous window is as large as it will get."""
        is_full = self._num_round_steps >= self.decision.depth
        return is_full or (self._drafting is None and not self._choose_stems())

    def _send_window(self, now_s: float) -> list[Effect]:
        """Send the likeliest unsent nodes whose parents are sent, the root first."""
        nodes = choose_unsent(self._tree, self.decision, self.decision.window_nodes, self._held)
        assert self._tree.root.number is not None or nodes[0] is self._tree.root
        first_node = self._next_node
        for node in nodes:
            self._tree.send(node, self._next_node)
            if node.parent is not None:
                self.stats.sent_by_source[node.source] = self.stats.sent_by_source.get(node.source, 0) + 1
            self._next_node += 1
        root_parent = BASE if first_node == 0 else first_node - 1
        parents = [root_parent if node.parent is None else _number(node.parent) for node in nodes]
        drafts = _draft_tops(nodes) if self.is_relaxed else ()
        effect = self._window([n.token for n in nodes], parents, [n.position for n in nodes], first_node, now_s, drafts)
        if self._tree.root is nodes[0]:
            self._wire_root = (self._epoch, first_node)
        self._num_round_steps = 0
        self._next_send_at_s = now_s + self._pace_s
        return [effect]

    def _draft(self, now_s: float) -> list[Effect]:
        mode = self.decision.mode
        is_wanted = mode is Mode.CONTINUOUS or (mode is Mode.SYNC and self._tree.root.number is None)
        if self._drafting is not None or not is_wanted:
            return []
        stems = self._choose_stems()
        if not stems:
            return []
        self._drafting = {node.key: node for node in stems}
        self._draft_started_s = now_s
        is_chain = mode is Mode.SYNC and self.decision.width == 1
        levels = self.decision.depth - self._num_round_steps if is_chain else 1
        self._num_round_steps += 1
        for node in stems:
            self._tree.expand(node)
        return [
            Draft(
                tokens=tuple(self.tokens),
                keys=tuple(self._keys),
                stems=tuple(Stem(key=node.key, path=_path(node)) for node in stems),
                width=NUM_CANDIDATES,
                levels=levels,
            )
        ]

    def _choose_stems(self) -> list[DraftNode]:
        # A node at the last position but one yields the last token: nothing deeper is of use.
        return choose_stems(self._tree, self.decision, self._end - 2)

    def _grow(self, node: DraftNode, candidates: Sequence[Candidate]) -> None:
        """Hang a drafter's answer below `node`."""
        node.candidates = tuple((candidate.token, candidate.logprob) for candidate in candidates)
        calibrated = self._tracker.calibrated([candidate.logprob for candidate in candidates])
        kept = list(zip(candidates, calibrated, strict=True))[: self.decision.width]
        for rank, (candidate, logprob) in enumerate(kept):
            child = self._tree.add(node, candidate.token, logprob, rank, candidate.source)
            self.stats.num_drafted_nodes += 1
            if candidate.children and not child.is_expanded and child.position < self._end - 2:
                if candidate.is_complete:
                    self._tree.expand(child)
                self._grow(child, candidate.children)

    def _decide(self, now_s: float, num_committed: int) -> None:
        """Let the policy choose again, knowing what the present windows have written since the last verdict."""
        if num_committed:
            # What comes in right after a change, or after the prompt, is due to the windows before, or to none.
            if self._num_unattributed <= 0:
                self._tracker.progress(self.decision, num_committed, now_s - self._committed_at_s)
            self._num_unattributed -= num_committed
            self._committed_at_s = now_s
        observation = self._tracker.observe()
        previous, self.decision = self.decision, self._policy.decide(observation)
        if self.decision.kind != previous.kind:
            self._num_unattributed = 1
        if self.decision != previous:
            self.stats.note_decision(len(self.tokens), self.decision)
        self._pace_s = observation.pace_s(self.decision.window_nodes)

    # Verdicts

    def _check(self, verdict: Verdict) -> None:
        if verdict.epoch > self._epoch:
            raise RemoteProtocolError("verdict epoch", verdict.epoch, f"at most {self._epoch}")
        if len(verdict.settled) != len(verdict.tokens):
            raise RemoteProtocolError("settled", len(verdict.settled), f"{len(verdict.tokens)} entries, one a token")
        num_logprobs = len(verdict.tokens) if self._request.text.top_logprobs >= 0 else 0
        if len(verdict.logprobs) != num_logprobs:
            raise RemoteProtocolError("logprobs", len(verdict.logprobs), f"{num_logprobs} entries")
        num_top, vocab_size = self._request.text.top_logprobs, self._request.vocab_size
        if not all(each.is_of(num_top, vocab_size) for each in verdict.logprobs):
            raise RemoteProtocolError("logprobs", verdict.logprobs, f"{num_top} of {vocab_size} tokens each")
        first_new = len(self._request.prompt)
        last_start = len(self.tokens) + self._next_node
        if not first_new <= verdict.start_pos <= last_start:
            raise RemoteProtocolError("start_pos", verdict.start_pos, f"{first_new}..{last_start}")
        if len(self._early) >= _MAX_EARLY_VERDICTS:
            raise RemoteProtocolError("verdicts out of order", len(self._early), f"below {_MAX_EARLY_VERDICTS}")
        if max(verdict.tokens) >= self._request.vocab_size:
            raise RemoteProtocolError("verdict tokens", verdict.tokens, f"below {self._request.vocab_size}")
        known = self.tokens[verdict.start_pos : verdict.start_pos + len(verdict.tokens)]
        if tuple(known) != verdict.tokens[: len(known)]:
            raise RemoteProtocolError("verdict tokens", verdict.tokens, f"the committed {known}")

    def _apply(self, verdict: Verdict, now_s: float) -> list[Effect]:
        """Commit the verdict's new tokens one by one; raise the epoch at the one no window carries."""
        self._measure(verdict, now_s)
        emitted: list[TokenId] = []
        num_known = len(self.tokens) - verdict.start_pos

        def emit() -> Emit:
            logprobs = verdict.logprobs[num_known : num_known + len(emitted)]
            return Emit(tokens=tuple(emitted), logprobs=logprobs)

        for token in verdict.tokens[num_known:]:
            is_sent = self._commit(token)
            emitted.append(token)
            if token in self._request.text.stop_tokens:
                return [emit(), *self._finish("stop")]
            if len(self.tokens) >= self._end:
                return [emit(), *self._finish("length")]
            if not is_sent:
                self._miss()
                if len(verdict.tokens) + verdict.start_pos > len(self.tokens):
                    raise RemoteProtocolError("verdict tokens", verdict.tokens, "none after one that was never sent")
        if not emitted:
            return []
        self._progress_at_s = now_s
        self._num_failed_attempts = 0
        if self.stats.first_token_at_s is None:
            self.stats.first_token_at_s = now_s
        effects: list[Effect] = [emit()]
        if self._tree.root.number is None and self._in_flight:
            effects += [Send(to=PeerId(h.peer), message=self._cancel()) for h in self.route.hops]
            self._in_flight.clear()
        return effects

    def _measure(self, verdict: Verdict, now_s: float) -> None:
        stage_s = [cost.us / 1e6 for cost in verdict.costs]
        self.stats.link_bytes = max(self.stats.link_bytes, verdict.link_bytes)
        self.stats.num_relaxed_tokens += verdict.num_relaxed
        for flight in self._in_flight:
            if flight.window == verdict.window:
                self.traversal_s = now_s - flight.sent_at_s
                self._is_measured = True
                self._tracker.verdict(
                    traversal_s=self.traversal_s + self.detour_s,
                    costs=verdict.costs,
                    waited_s=verdict.waited / WAITED_PER_S,
                )
                self.stats.num_verdicts += 1
                totals = self.stats.stage_s or [0.0] * len(stage_s)
                self.stats.stage_s = [a + b for a, b in zip(totals, stage_s, strict=False)]
                self.stats.num_stale_nodes += verdict.num_stale
        # Frames keep their order, so the tail is done with every window up to this one.
        self._in_flight = [flight for flight in self._in_flight if flight.window > verdict.window]

    def _commit(self, token: TokenId) -> bool:
        """Move the root to `token`; True when a window carries it already."""
        old_root = self._tree.root
        if old_root.number is not None:
            self._passed = (self._epoch, old_root.number, old_root.position)
        hit = self._tree.commit(token)
        if old_root.candidates:
            ranks = (rank for rank, (candidate, _) in enumerate(old_root.candidates) if candidate == token)
            self._tracker.outcome(next(ranks, None), [logprob for _, logprob in old_root.candidates])
            self.stats.outcome(
                depth=old_root.depth + 1, rank=hit.rank if hit else None, source=hit.source if hit else ""
            )
        self.tokens.append(token)
        self._keys.append(self._tree.root.key)
        if hit is None or hit.number is None:
            return False
        self._wire_root = (self._epoch, hit.number)
        if self._request.attest:
            self.carried.append((hit.position, self._epoch, hit.number))
        return True

    def _miss(self) -> None:
        """Open a new epoch with the target's own token as its first node; what is drafted below it stays."""
        self.stats.num_misses += 1
        self._raise_epoch()

    # Opening, closing

    @property
    def _end(self) -> int:
        """Length of the finished text, prompt included."""
        return self._request.max_length

    def _open(self, now_s: float, kept: tuple[bool, ...]) -> list[Effect]:
        """Open the session at a new epoch; unless the head has kept it, send everything committed except the root, in chunks."""
        self._raise_epoch()
        self._opened_epoch = self._epoch
        self._in_flight.clear()
        self._wire_root = (self._epoch, BASE)
        self._progress_at_s = now_s
        given = self.tokens[:-1]
        effects: list[Effect] = [Send(to=self.route.head, message=self._open_message(kept))]
        if kept and kept[0]:
            self._next_node = len(given)
            self._wire_root = (self._epoch, len(given) - 1)
            # A stage that is refilled by its neighbour sees these numbers taken.
            self._next_window = max(self._next_window, -(-len(given) // FILL_NODES))
            return effects
        chunk = self._request.prefill_chunk
        num_held = self._take_prefix()
        for start in range(num_held, len(given), chunk):
            tokens = given[start : start + chunk]
            positions = range(start, start + len(tokens))
            effects.append(self._window(tokens, [pos - 1 for pos in positions], positions, start, now_s))
            self._next_node = start + len(tokens)
            self._wire_root = (self._epoch, self._next_node - 1)
        self._max_unmeasured = len(self._in_flight) + _UNMEASURED_IN_FLIGHT
        self.stats.num_prefill_tokens += len(given) - num_held
        return effects

    def _take_prefix(self) -> int:
        """Number on behind the tokens that the stages have parked; returns how many."""
        num_held = self.prefix.num_tokens if self.prefix is not None else 0
        if num_held:
            self._next_node = num_held
            self._wire_root = (self._epoch, num_held - 1)
        self.stats.num_prefix_tokens = num_held
        return num_held

    def _open_message(self, kept: tuple[bool, ...]) -> OpenSession:
        request, route = self._request, self.route
        passed = self._passed or (0, BASE, 0)
        return OpenSession(
            session=request.session,
            epoch=self._epoch,
            route=route.hops,
            coordinator=request.coordinator,
            model=route.model,
            text=request.text,
            num_prompt=request.num_prompt,
            num_given=len(self.tokens),
            idle_timeout_s=2 * request.stall_timeout_s,
            formats=request.hidden_formats if len(route.hops) > 1 else (),
            kept=kept,
            resume=passed[:2] if kept else (0, BASE),
            attest=request.attest,
            prefix=self.prefix,
        )

    def _raise_epoch(self) -> None:
        self._epoch += 1
        self.stats.num_epochs += 1
        self._next_node = 0
        self._early.clear()
        self._tree.forget_sent()

    def _window(
        self,
        tokens: Sequence[TokenId],
        parents: Sequence[int],
        positions: Sequence[int],
        first_node: int,
        now_s: float,
        drafts: tuple[DraftTop, ...] = (),
    ) -> Send:
        window = Window(
            session=self._request.session,
            epoch=self._epoch,
            window=self._next_window,
            root=self._wire_root,
            first_node=first_node,
            tokens=tuple(tokens),
            parents=tuple(parents),
            positions=tuple(positions),
            drafts=drafts,
        )
        if not self._in_flight:
            self._progress_at_s = now_s
        self._in_flight.append(_InFlight(window=self._next_window, num_nodes=len(tokens), sent_at_s=now_s))
        self._next_window += 1
        self.stats.num_windows += 1
        self.stats.num_nodes_sent += len(tokens)
        self.stats.max_windows_in_flight = max(self.stats.max_windows_in_flight, len(self._in_flight))
        return Send(to=self.route.head, message=window)

    def _cancel(self) -> Cancel:
        return Cancel(session=self._request.session, epoch=self._epoch)

    def _close_message(self) -> CloseSession:
        return CloseSession(session=self._request.session, epoch=max(self._epoch, 0), park=self.parked)

    def _close(self) -> list[Effect]:
        self._in_flight.clear()
        return [Send(to=PeerId(hop.peer), message=self._close_message()) for hop in self.route.hops]

    def _finish(self, reason: str, error: DsdError | None = None) -> list[Effect]:
        self.is_finished = True
        if self._request.is_parked and error is None and reason != "cancelled" and self._passed is not None:
            epoch, node, position = self._passed
            self.parked = Park(at=(epoch, node), num_tokens=position + 1)
        return [*self._close(), Finish(reason=reason, error=error)]


def _draft_tops(nodes: Sequence[DraftNode]) -> tuple[DraftTop, ...]:
    return tuple(
        DraftTop(
            offset=offset,
            tokens=tuple(token for token, _ in node.candidates[:MAX_DRAFT_TOP]),
            centinats=tuple(_centinats(logprob) for _, logprob in node.candidates[:MAX_DRAFT_TOP]),
        )
        for offset, node in enumerate(nodes)
        if node.candidates
    )


def _num_levels(candidates: Sequence[Candidate]) -> int:
    """How many draft steps an answer stands for: those of complete answers below one another."""
    num_levels = 1
    while (below := next((each.children for each in candidates if each.is_complete), ())) != ():
        num_levels, candidates = num_levels + 1, below
    return num_levels


def _centinats(logprob: float) -> int:
    return min(max(0, round(-100 * logprob)), 100_000)


def _number(node: DraftNode) -> int:
    assert node.number is not None, "a node is sent after its parent"
    return node.number


def _path(node: DraftNode) -> tuple[tuple[int, TokenId], ...]:
    path: list[tuple[int, TokenId]] = []
    while node.parent is not None:
        path.append((node.key, node.token))
        node = node.parent
    return tuple(reversed(path))
