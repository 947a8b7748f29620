"""Runs requests: `open_engine` starts a coordinator, and `Engine.generate` streams the tokens of one request."""

import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from dsd_p2p.coordination.directory import NO_DETOUR, Directory, StageList
from dsd_p2p.coordination.draft_places import DraftPlaces
from dsd_p2p.coordination.driver import RequestDriver, Told
from dsd_p2p.coordination.far_drafts import FarDrafts
from dsd_p2p.coordination.generation import Generation
from dsd_p2p.coordination.guessing import Elsewhere, Guesses
from dsd_p2p.coordination.hints import SharedExperience
from dsd_p2p.coordination.own_drafter import OwnDrafter
from dsd_p2p.coordination.prefixes import PrefixIndex, scope_of
from dsd_p2p.coordination.trust import Trust
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.choice import DrafterChoice, Loop
from dsd_p2p.drafting.guided import Guide
from dsd_p2p.errors import (
    ConfigError,
    PeerDisconnected,
    PeerError,
)
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.services import Handler, run_services
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.effects import Emit
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Request, Route
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.session.timing import Timing
from dsd_p2p.telemetry.watch import RequestWatch, Sink
from dsd_p2p.transport.base import Lost, Transport
from dsd_p2p.types import (
    Endpoint,
    HiddenFormat,
    PeerId,
    PeerInfo,
    SessionId,
    TextRequest,
    TokenId,
    check_text_request,
)
from dsd_p2p.window.base import Observation, WindowPolicy
from dsd_p2p.window.governor import GovernedPolicy, Governor, Share
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.drafts import Drafted
from dsd_p2p.wire.messages import (
    MAX_EPOCH,
    MAX_RECOMPUTED,
    CloseSession,
    Failure,
    Message,
    Recomputed,
    Revealed,
    Verdict,
)

logger = logging.getLogger(__name__)

_OUTPUT_BATCHES = 1024
_DISCARD_TIMEOUT_S = 15.0
_USUAL_LOOP = Loop(traversal_s=0.2, slowest_s=0.02)
_LOOP_NODES = 8
"""Nodes of the window for which drafters are compared: the usual one on a long link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The text that a request asks for, and how the coordinator handles it; see `dsd_p2p.session.request.Request`.

    num_written: how many of the prompt's last tokens already belong to the answer.
    audit: have the stages sign their windows, and check them (see `.audit`).
    experience: requests of the same name share their measurements of a route.
    owner: requests of one owner may go on from one another's parked text; "" parks nothing.
    """

    text: TextRequest
    num_written: int = 0
    prefill_chunk: int = 128
    stall_timeout_s: float = 60.0
    hidden_format: HiddenFormat = HiddenFormat.MODEL
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    audit: bool = False
    experience: str = ""
    owner: str = ""


class Engine:
    """A coordinator's requests: it finds routes, drafts and streams tokens. A service of `dsd_p2p.peers.services`.

    can_cut_texts: False for a model with recurrent layers (`PrefixIndex`).
    tell: receives the telemetry events of the requests, if set. places: where else requests may be drafted, if set.
    experience: where measurements of routes outlive this process and reach other members, if set.
    """

    def __init__(
        self,
        links: PeerLinks,
        drafter: Drafter | DrafterChoice,
        vocab_size: int,
        nursery: trio.Nursery,
        directory: Directory,
        *,
        can_cut_texts: bool = True,
    ) -> None:
        self.links = links
        self.own_drafter = OwnDrafter(drafter, nursery)
        self._vocab_size = vocab_size
        self._nursery = nursery
        self._directory = directory
        self._drivers: dict[bytes, RequestDriver] = {}
        self._trackers: dict[tuple[str, ...], Tracker] = {}
        self._last_tracker = Tracker()
        self.trust = Trust(links, directory)
        self.tell: Sink | None = None
        self._governor = Governor()
        self._prefixes = PrefixIndex(can_cut=can_cut_texts)
        self._far = FarDrafts(links, vocab_size)
        self.places: DraftPlaces | None = None
        self.experience: SharedExperience | None = None

    @property
    def drafter(self) -> Drafter:
        """The drafter of the next request that drafts here."""
        return self.own_drafter.current

    def governed(self, policy: WindowPolicy) -> WindowPolicy:
        """Return a policy that speculates only while that helps all requests together."""
        return GovernedPolicy(policy, self._governor, trio.current_time)

    def observe(self) -> Observation:
        """Return the measurements of the last route and of the drafter."""
        return self._last_tracker.observe()

    def _experience_name(self, route: Route, experience: str) -> tuple[str, ...]:
        return experience, self.drafter.name, repr(route.model), *(f"{hop.peer} {hop.span}" for hop in route.hops)

    def _tracker(self, name: tuple[str, ...]) -> Tracker:
        if name not in self._trackers:
            self._trackers[name] = Tracker()
            if self.experience is not None:
                self.experience.begin(name, self._trackers[name], self._nursery)
        self._last_tracker = self._trackers[name]
        return self._last_tracker

    async def _find_route(self, detour: Detour) -> Route:
        try:
            return await self._directory.find(self.trust.avoid(detour))
        except ConfigError as exc:
            raise PeerDisconnected(f"a stage was lost: {exc}") from exc

    @asynccontextmanager
    async def generate(
        self, prompt: Sequence[TokenId], options: GenerateOptions, policy: WindowPolicy
    ) -> AsyncIterator[Generation]:
        """Run one request; leaving the block early ends it and frees the stages' caches.

        Raises:
            ConfigError: no route, an invalid prompt or option, or a text longer than the model's context.
            PeerError: no route was found in time, or it cannot be audited.
        """
        route = await self._directory.find(self.trust.avoid(NO_DETOUR))
        self._check(prompt, options, route.max_positions)
        if options.audit:
            self.trust.check_route(route)
        request = self._request(prompt, options, route)
        session = request.session
        self.own_drafter.want()
        name = self._experience_name(route, options.experience)
        tracker = self._tracker(name)
        machine = RequestMachine(request, route, policy, tracker, random.Random(secrets.randbits(64)))  # noqa: S311
        guesses = self._guesses(request, route, tracker)
        share = Share(self._governor, trio.current_time)
        driver = RequestDriver(
            machine,
            self.links,
            guesses,
            self._find_route,
            checks=self.trust.checks_of(request) if options.audit else None,
            watch=None if self.tell is None else RequestWatch(machine, self.tell, time.time, lambda: guesses.name),
            committed=share.committed,
        )
        self._drivers[session] = driver
        output, batches = trio.open_memory_channel[Emit](_OUTPUT_BATCHES)
        # Run it in the engine's nursery, so that the caller's own errors are not wrapped in an exception group.
        self._nursery.start_soon(driver.run, output)
        try:
            yield Generation(
                batches=batches,
                stats=machine.stats,
                machine=machine,
                driver=driver,
                timing=Timing(started_at_s=trio.current_time()),
            )
        finally:
            batches.close()
            with trio.CancelScope(shield=True):
                await driver.stop()
            self._note_parked(request, machine, options)
            del self._drivers[session]
            share.left()
            with trio.CancelScope(shield=True):
                await guesses.close()
            self._learn(request, machine, tracker)
            if self.experience is not None and tracker.observe().stages:
                self._nursery.start_soon(trio.to_thread.run_sync, self.experience.keep, name, tracker.kept())

    def _learn(self, request: Request, machine: RequestMachine, tracker: Tracker) -> None:
        """Let the drafters be measured on an answer that ended well."""
        if machine.is_finished and tracker.observe().stages:
            self.own_drafter.learn(list(machine.tokens), len(request.prompt) - request.num_written, _loop_of(tracker))

    def _guesses(self, request: Request, route: Route, tracker: Tracker) -> Guesses:
        """Start this process's drafter on a request that may also be drafted by the members in `places`."""
        elsewhere = None
        if self.places is not None:
            loop = partial(_loop_of, tracker)
            elsewhere = Elsewhere(
                places=self.places, far=self._far, model=route.model, loop=loop, moved=tracker.drafter_moved
            )
        step_s = self.own_drafter.step_s
        return Guesses(self.drafter, request.max_length, request.text.sampling, step_s, elsewhere, self._guide(request))

    def _guide(self, request: Request) -> Guide | None:
        constraint, grammars = request.text.constraint, self.own_drafter.grammars
        if constraint is None or grammars is None:
            return None
        grammar = grammars.grammar(constraint, request.text.stop_tokens)
        return Guide(grammar, len(request.prompt) - request.num_written)

    def _request(self, prompt: Sequence[TokenId], options: GenerateOptions, route: Route) -> Request:
        is_parked = bool(options.owner) and not options.audit
        scope = scope_of(options.owner, route, options.hidden_format)
        num_prompt = len(prompt) - options.num_written
        # A parked text replaces prompt tokens only; tokens written before must pass the tail again.
        prefix = self._prefixes.find(scope, prompt[: num_prompt + 1], trio.current_time()) if is_parked else None
        transport = self.links.transport
        return Request(
            session=SessionId(secrets.token_bytes(8)),
            prompt=prompt,
            text=options.text,
            vocab_size=self._vocab_size,
            coordinator=Endpoint(transport.peer, transport.addresses[0] if transport.addresses else ""),
            num_written=options.num_written,
            prefill_chunk=options.prefill_chunk,
            stall_timeout_s=options.stall_timeout_s,
            hidden_formats=_formats(options.hidden_format, len(route.hops) - 1),
            retry=options.retry,
            attest=options.audit,
            prefix=prefix,
            is_parked=is_parked,
        )

    def _note_parked(self, request: Request, machine: RequestMachine, options: GenerateOptions) -> None:
        """Remember the text that the stages have parked, and forget a prefix that they turned out to lack."""
        lost = request.prefix.session if request.prefix is not None and machine.opening.prefix is None else b""
        if lost and (route := self._prefixes.forget(lost)) is not None:
            self._nursery.start_soon(self._discard, lost, route)
        if machine.opening.parked is None:
            return
        scope = scope_of(options.owner, machine.route, options.hidden_format)
        tokens = machine.tokens[: machine.opening.parked.num_tokens]
        replaced = self._prefixes.add(
            scope, machine.route, request.session, tokens, request.num_prompt, trio.current_time()
        )
        for session, route in replaced:
            self._nursery.start_soon(self._discard, session, route)

    async def _discard(self, session: bytes, route: Route) -> None:
        """Ask the stages of `route` to discard a parked text."""
        for hop in route.hops:
            with suppress(PeerError), trio.move_on_after(_DISCARD_TIMEOUT_S):
                await self.links.send(PeerId(hop.peer), CloseSession(session=session, epoch=MAX_EPOCH))

    def _check(self, prompt: Sequence[TokenId], options: GenerateOptions, limit: int) -> None:
        """Refuse a request that the route cannot serve. limit: the longest text that the route takes."""
        if not prompt:
            raise ConfigError("the prompt is empty: give at least one token")
        if max(prompt) >= self._vocab_size or min(prompt) < 0:
            raise ConfigError(f"a prompt token is outside the model's vocabulary of {self._vocab_size}")
        text, num_prompt = options.text, len(prompt) - options.num_written
        if text.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {text.max_tokens}: ask for at least 1")
        if not 0 <= options.num_written < min(len(prompt), text.max_tokens):
            raise ConfigError(
                f"num_written is {options.num_written}: expected at least 0, and fewer than the {len(prompt)} tokens "
                f"given and the {text.max_tokens} asked for"
            )
        if num_prompt + text.max_tokens > limit:
            raise ConfigError(
                f"prompt of {num_prompt} and {text.max_tokens} new tokens exceed the model's context of {limit}: "
                "shorten the prompt or lower --max-tokens"
            )
        check_text_request(text)
        if options.audit and (options.hidden_format is not HiddenFormat.MODEL or text.relaxation is not None):
            raise ConfigError("--audit compares exact rows: leave out --hidden and --verify relaxed")
        if options.audit and len(prompt) + text.max_tokens > MAX_RECOMPUTED:
            raise ConfigError(f"an audited text has at most {MAX_RECOMPUTED} tokens with its prompt: ask for fewer")

    def start(self, nursery: trio.Nursery) -> None:
        """Do nothing: requests run in the nursery that the engine was given."""

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of each message type."""
        return {
            Verdict: self._hear,
            Failure: self._hear,
            Revealed: self.trust.hear,
            Recomputed: self.trust.hear,
            Drafted: self._far.hear,
        }

    async def _hear(self, event: Arrived, message: Verdict | Failure) -> None:
        """Hand a verdict or failure to its request; penalise a sender that is not a stage of it."""
        driver = self._drivers.get(message.session)
        if driver is not None and driver.involves(event.sender):
            self._hand(driver, Told(sender=event.sender, message=message))
        else:
            self.links.transport.penalise(event.sender)

    def lost(self, event: Lost) -> None:
        """Report a lost peer to every request."""
        self._far.lost(event)
        self.trust.lost(event.peer)
        for driver in self._drivers.values():
            self._hand(driver, event)

    @staticmethod
    def _hand(driver: RequestDriver, event: Told | Lost) -> None:
        try:
            driver.inbox.send_nowait(event)
        except trio.WouldBlock:
            logger.exception("request overrun: event dropped, the stall deadline will end it")


def _loop_of(tracker: Tracker) -> Loop:
    """Return what a request's route takes, or the usual of a wide-area route while nothing is measured."""
    observation = tracker.observe()
    if not observation.stages:
        return _USUAL_LOOP
    return Loop(traversal_s=observation.traversal_s(_LOOP_NODES), slowest_s=observation.slowest_stage_s(_LOOP_NODES))


def _formats(hidden_format: HiddenFormat, num_links: int) -> tuple[HiddenFormat, ...]:
    return () if hidden_format is HiddenFormat.MODEL else (hidden_format,) * num_links


@asynccontextmanager
async def open_engine(
    transport: Transport, drafter: Drafter | DrafterChoice, vocab_size: int, *, can_cut_texts: bool = True
) -> AsyncIterator[tuple[Engine, StageList]]:
    """Run an engine on `transport`; yield it with the list of stages that it may use, empty at first."""
    links = PeerLinks(transport, PeerInfo(peer=transport.peer, addresses=transport.addresses))
    stages = StageList(links)
    async with trio.open_nursery() as nursery:
        engine = Engine(links, drafter, vocab_size, nursery, stages, can_cut_texts=can_cut_texts)
        nursery.start_soon(run_services, links, [engine])
        yield engine, stages
        nursery.cancel_scope.cancel()
