"""Runs one request in virtual time: performs a `RequestMachine`'s effects, as the live driver does on real peers."""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_p2p.errors import DsdError, PeerDisconnected
from dsd_p2p.netmodel import LinkState
from dsd_p2p.session.effects import Candidate, Draft, Effect, Emit, Finish, Replay, Send
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Route
from dsd_p2p.sim.answer import Answer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.service import PassCost, Processor
from dsd_p2p.sim.target import Target, TargetSession, window_bytes
from dsd_p2p.telemetry.watch import RequestWatch
from dsd_p2p.types import ComputeFormat, Endpoint, ModelKey, UniformRng
from dsd_p2p.window.base import Mode
from dsd_p2p.wire.messages import Cancel, CloseSession, OpenSession, Verdict, Window

_VERDICT_BYTES, _STATE_BYTES, _PROMPT_BYTES = 60, 64, 4
_MAX_PUT_OFF_DRAFTS = 4
_FUSED_AFTER = 2
"""A request moves to its target after so many decisions in a row not to speculate."""


SIMULATED_MODEL = ModelKey(digest="simulated", weights="simulated", compute=ComputeFormat.FLOAT32)
SIMULATED_PEER = Endpoint("sim")


class DraftDevice:
    """A machine that computes drafts, one after the other.

    handling_s: the coordinator's work here on each message that it sends or receives; it delays the next draft.
    """

    def __init__(self, cost: PassCost, processor: Processor, handling_s: float = 0.0) -> None:
        self._cost, self._processor, self._handling_s = cost, processor, handling_s
        self._owed_s = 0.0
        self._drafted_s = 0.0
        self._waiting: deque[tuple[float, Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_busy = False

    def draft(self, num_stems: int, levels: int, num_unread: int, done: Callable[..., object], *arguments: Any) -> None:
        """Call `done` after `levels` draft steps of `num_stems` stems each.

        The first step also reads `num_unread` tokens of the text.
        """
        seconds = self._cost.at(num_stems + num_unread) + (levels - 1) * self._cost.at(num_stems)
        self._waiting.append((seconds, done, arguments))
        if not self._is_busy:
            self._next()

    def handle_message(self) -> None:
        """Delay the next draft by the coordinator's work on one message.

        The delay is bounded, because the coordinator also works while nothing is drafted.
        """
        self._owed_s = min(
            self._owed_s + self._handling_s, _MAX_PUT_OFF_DRAFTS * max(self._drafted_s, self._handling_s)
        )

    def _next(self) -> None:
        seconds, done, arguments = self._waiting.popleft()
        seconds, self._owed_s = seconds + self._owed_s, 0.0
        self._is_busy = True
        self._drafted_s = seconds
        self._processor.run(seconds, self._finish, done, arguments)

    def _finish(self, done: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._is_busy = False
        if self._waiting:
            self._next()
        done(*arguments)


@dataclass(slots=True, eq=False)
class Path:
    """The way from a drafter to a target and back. device: drafts at the target, for coordinators that sit there."""

    target: Target
    up: LinkState
    down: LinkState
    route: Route
    device: DraftDevice | None = None

    @property
    def latency_s(self) -> float:
        """Latency of the way there and back, seconds."""
        return self.up.model.latency_s + self.down.model.latency_s


_KEPT_COUNTS = (
    "num_windows",
    "num_nodes_sent",
    "num_prefill_tokens",
    "num_misses",
    "num_epochs",
    "num_stale_nodes",
    "num_drafted_nodes",
    "num_draft_steps",
    "num_replays",
)


@dataclass(slots=True, eq=False)
class RequestLog:
    """The log of one request. Times are in seconds since the start of the run; arrivals are (time, tokens)."""

    number: int
    arrived_s: float
    num_prompt_tokens: int
    arrivals: list[tuple[float, int]] | None = None
    first_s: float = math.nan
    finished_s: float = math.nan
    first_size: int = 0
    num_tokens: int = 0
    network_s: float = 0.0
    target: str = ""
    error: str = ""
    num_switches: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*_KEPT_COUNTS, "draft_s"), 0.0))

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first arrival; NaN if no token came later."""
        later = self.num_tokens - self.first_size
        return (self.finished_s - self.first_s) / later if later > 0 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The settings of one request.

    deadline_s: when the request should be finished. notice_s: time until a target that is down is given up.
    is_fusing: when the policy has decided twice in a row not to speculate, the coordinator moves to the target, and
        only committed tokens travel, until the policy speculates again (arXiv:2511.21669).
    is_at_target: drafter and coordinator sit at the target from the start.
    """

    deadline_s: float
    notice_s: float = 0.0
    is_fusing: bool = False
    is_at_target: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWorld:
    """The surroundings of a request. rng: for the links.

    choose_path: returns the way to a target that is up, or None; called after a target was lost.
    finished: called when the request has ended.
    moved: called with the target that the request leaves and the next one; None at start and end.
    watch: reports the request's events, as a live watch does.
    """

    clock: Clock
    rng: UniformRng
    device: DraftDevice
    choose_path: Callable[[], Path | None]
    finished: Callable[["RequestRun"], None]
    moved: Callable[[Target | None, Target | None], None]
    watch: RequestWatch | None = None


class RequestRun:
    """One request in virtual time, which performs its machine's effects."""

    def __init__(
        self, machine: RequestMachine, answer: Answer, log: RequestLog, settings: RunSettings, world: RunWorld
    ) -> None:
        self.machine, self.answer, self.log = machine, answer, log
        self._settings, self._world = settings, world
        self._is_at_target = settings.is_at_target
        # Decisions in a row not to speculate.
        self._num_plain = 0
        # Tokens of the prompt that the drafter has not read yet.
        self._num_unread = log.num_prompt_tokens
        self.path: Path | None = None
        self._session: TargetSession | None = None
        self._timer_s = math.inf
        # Effects that wait while the coordinator moves; None while it does not move.
        self._moving: list[Effect] | None = None

    @property
    def deadline_s(self) -> float:
        """When the request should be finished."""
        return self._settings.deadline_s

    def start(self, path: Path) -> None:
        """Start the request over `path`."""
        self._go_over(path)
        if self._is_at_target:
            # The prompt has to get there first.
            self._world.clock.after(self._travel(path.up, _PROMPT_BYTES * self.log.num_prompt_tokens), self._begin)
        else:
            self._begin()

    def _go_over(self, path: Path | None) -> None:
        self._world.moved(self.path.target if self.path else None, path.target if path else None)
        if path is not None:
            self.path = path
            self.log.target = path.target.name

    def _begin(self) -> None:
        self._do(self.machine.start(self._world.clock.now_s))
        target = self.path.target if self.path is not None else None
        if target is not None and not target.is_up:
            # The target was down before the request came; that is noticed like any other loss.
            self._world.clock.after(
                self._settings.notice_s, self.lost, PeerDisconnected(f"{target.name} is down"), self._session
            )

    # Effects of the machine

    def _perform(self, effects: Sequence[Effect]) -> None:
        if self._moving is not None:
            self._do([effect for effect in effects if type(effect) is Emit])
            self._moving.extend(effect for effect in effects if type(effect) is not Emit)
            return
        is_wanted_at_target = self._settings.is_at_target or (
            self._settings.is_fusing and self._num_plain >= _FUSED_AFTER
        )
        if is_wanted_at_target is self._is_at_target or self.machine.is_finished:
            self._do(effects)
            return
        # The coordinator moves: its next effects happen one way later. Tokens for the user do not wait for that.
        assert self.path is not None
        self._do([effect for effect in effects if type(effect) is Emit])
        link = self.path.up if is_wanted_at_target else self.path.down
        self._is_at_target = is_wanted_at_target
        self.machine.moved(self.path.latency_s if is_wanted_at_target else 0.0)
        self.log.num_switches += 1
        self._moving = [effect for effect in effects if type(effect) is not Emit]
        self._world.clock.after(self._travel(link, _STATE_BYTES), self._moved_in)

    def _moved_in(self) -> None:
        assert self._moving is not None
        effects, self._moving = self._moving, None
        self._do(effects)

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            # `match` takes six times as long per effect, which costs a run a few percent.
            kind = type(effect)
            if kind is Send:
                self._send(effect.message)  # type: ignore[union-attr]
            elif kind is Draft:
                self._draft(effect)  # type: ignore[arg-type]
            elif kind is Emit:
                self._emit(len(effect.tokens))  # type: ignore[union-attr]
            elif kind is Replay:
                self._world.clock.after(effect.delay_s, self._reroute)  # type: ignore[union-attr]
            elif kind is Finish:
                self._finish(effect)  # type: ignore[arg-type]
        self._watch()

    def _send(self, message: Window | OpenSession | Cancel | CloseSession) -> None:
        path, session = self.path, self._session
        assert path is not None
        match message:
            case Window() as window if session is not None:
                self._world.device.handle_message()
                self._world.clock.after(self._up_s(window_bytes(window)), path.target.put, session, window)
            case OpenSession() as opened:
                if self._world.watch is not None:
                    self._world.watch.opened(opened)
                self._session = path.target.open(self, opened.epoch, opened.num_prompt, opened.num_given)
            case Cancel(epoch=epoch) if session is not None:
                self._world.clock.after(self._up_s(32), _cancel, session, epoch)
            case CloseSession() if session is not None:
                self._world.clock.after(self._up_s(32), path.target.close, session)
            case Window() | Cancel() | CloseSession():
                # The message was for a target that is gone.
                pass

    def _draft(self, draft: Draft) -> None:
        children = self.answer.expand(draft)
        levels = draft.levels if all(_is_deep(each) for each in children) else 1
        assert self.path is not None
        num_unread, self._num_unread = self._num_unread, 0
        (self.path.device or self._world.device).draft(len(draft.stems), levels, num_unread, self._drafted, children)

    def _drafted(self, children: list[list[Candidate]]) -> None:
        self._perform(self.machine.drafted(children, self._world.clock.now_s))

    def _emit(self, num_tokens: int) -> None:
        log = self.log
        assert self.path is not None
        now_s = self._world.clock.now_s + (self._travel(self.path.down, _VERDICT_BYTES) if self._is_at_target else 0.0)
        if log.num_tokens == 0:
            log.first_s, log.first_size = now_s, num_tokens
        log.num_tokens += num_tokens
        log.finished_s = now_s
        if log.arrivals is not None:
            log.arrivals.append((now_s, num_tokens))

    def _finish(self, finish: Finish) -> None:
        log = self.log
        log.error = str(finish.error or "")
        if self._world.watch is not None:
            self._world.watch.ended(finish.reason, log.error)
        stats = self.machine.stats
        log.counts = {name: getattr(stats, name) for name in _KEPT_COUNTS}
        log.counts["draft_s"] = stats.draft_s
        if log.num_tokens == 0 or log.error:
            log.finished_s = self._world.clock.now_s
        self._go_over(None)
        # The target's last tokens are still on their way.
        self._world.clock.after(max(0.0, log.finished_s - self._world.clock.now_s), self._world.finished, self)

    # Events from outside

    def verdict(self, verdict: Verdict, session: TargetSession) -> None:
        """Send a verdict from the tail to the coordinator."""
        self._world.clock.after(self._down_s(_VERDICT_BYTES), self._receive, verdict, session)

    def _receive(self, verdict: Verdict, session: TargetSession) -> None:
        if session is not self._session or self.machine.is_finished:
            return
        self._world.device.handle_message()
        decision = self.machine.decision
        self.log.decisions[f"{decision.mode.value} {decision.depth}"] += 1
        effects = self.machine.receive(verdict, self._world.clock.now_s)
        self._num_plain = self._num_plain + 1 if self.machine.decision.mode is Mode.PLAIN else 0
        if self._world.watch is not None:
            self._world.watch.verdict(verdict)
        self._perform(effects)

    def lost(self, error: DsdError, session: TargetSession) -> None:
        """Tell the machine that the session's target is lost."""
        if session is not self._session:
            return
        session.target.close(session)
        self._session = None
        if self._moving is not None:
            # The effects that waited for the move are lost too.
            self._moving = []
        self._now_or_moved(self.machine.lost(error, self._world.clock.now_s))

    def _reroute(self) -> None:
        path = self._world.choose_path()
        if path is None:
            error = PeerDisconnected("no target is up")
            self._now_or_moved(self.machine.route_not_found(error, self._world.clock.now_s))
            return
        self._go_over(path)
        self._now_or_moved(self.machine.reopen(path.route, self._world.clock.now_s))

    def _now_or_moved(self, effects: Sequence[Effect]) -> None:
        if self._moving is not None:
            self._moving.extend(effects)
        else:
            self._do(effects)

    def _watch(self) -> None:
        """Set a timer for the machine's deadline. Only one counts; if it goes off too early, set it again."""
        due_s = self.machine.deadline_s
        if due_s < self._timer_s and not self.machine.is_finished:
            self._timer_s = due_s
            self._world.clock.deadline(max(0.0, due_s - self._world.clock.now_s), self._wake, due_s)

    def _wake(self, due_s: float) -> None:
        if due_s != self._timer_s:
            return
        self._timer_s = math.inf
        if self.machine.is_finished:
            return
        if self.machine.deadline_s <= self._world.clock.now_s:
            self._perform(self.machine.wake(self._world.clock.now_s))
        else:
            self._watch()

    # Links

    def _up_s(self, num_bytes: int) -> float:
        assert self.path is not None
        return 0.0 if self._is_at_target else self._travel(self.path.up, num_bytes)

    def _down_s(self, num_bytes: int) -> float:
        assert self.path is not None
        return 0.0 if self._is_at_target else self._travel(self.path.down, num_bytes)

    def _travel(self, link: LinkState, num_bytes: int) -> float:
        now_s = self._world.clock.now_s
        seconds = link.send(now_s=now_s, num_bytes=num_bytes, rng=self._world.rng) - now_s
        self.log.network_s += seconds
        return seconds


def _cancel(session: TargetSession, epoch: int) -> None:
    session.cancelled_below = max(session.cancelled_below, epoch)


def _is_deep(candidates: Sequence[Candidate]) -> bool:
    return any(candidate.is_complete for candidate in candidates)
