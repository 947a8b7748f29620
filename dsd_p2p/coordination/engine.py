"""The way in: `open_engine` connects to stages, `Engine.generate` streams one request's tokens."""

import logging
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import trio

from dsd_p2p.coordination.audit import Auditor
from dsd_p2p.coordination.directory import NO_DETOUR, Directory, StageList
from dsd_p2p.coordination.driver import RequestDriver, Told
from dsd_p2p.coordination.prefixes import PrefixIndex, scope_of
from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import (
    CapacityError,
    ConfigError,
    DishonestPeer,
    LocalProtocolError,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
)
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.services import Handler, run_services
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.effects import Emit, Finish
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Request, RequestStats, Route
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.session.timing import Timing
from dsd_p2p.telemetry.watch import RequestWatch, Sink
from dsd_p2p.transport.base import Lost, Transport
from dsd_p2p.types import (
    Endpoint,
    PeerId,
    PeerInfo,
    Sampling,
    SessionId,
    Span,
    TextRequest,
    TokenId,
    check_text_request,
)
from dsd_p2p.window.base import Decision, Observation, WindowPolicy
from dsd_p2p.window.governor import GovernedPolicy, Governor
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.hidden import HiddenFormat
from dsd_p2p.wire.messages import (
    MAX_EPOCH,
    CloseSession,
    Failure,
    Message,
    Recompute,
    Recomputed,
    Reveal,
    Revealed,
    Verdict,
)

logger = logging.getLogger(__name__)

_OUTPUT_BATCHES = 1024
_ASK_TIMEOUT_S = 15.0
_DISTRUST_S = 3600.0
_LOOKUP = NgramDrafter()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The text that one request asks for, and how the coordinator goes about it; see `dsd_p2p.session.request.Request`.

    num_written: the last tokens of the prompt that belong to the answer already.
    audit: have the stages sign, and check them (`.audit`). experience: whose measurements of the route it shares.
    owner: who shares text: answers of one owner go on from what the stages still hold of one another's; "" holds nothing.
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


@dataclass(slots=True, kw_only=True)
class Generation:
    """One request under way. Iterate over it for its tokens, or over `pieces`; then read the rest."""

    batches: trio.MemoryReceiveChannel[Emit]
    stats: RequestStats
    machine: RequestMachine
    driver: RequestDriver
    timing: Timing
    waiting: deque[TokenId] = field(default_factory=deque)

    async def pieces(self) -> AsyncGenerator[Emit, None]:
        """Yield the tokens as they come, those of one verdict together.

        Raises:
            DsdError: what ended the request; everything yielded before stands.
        """
        while (piece := await self._next_piece()) is not None:
            yield piece

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> TokenId:
        """Return the next committed token; raises as `pieces` does."""
        while not self.waiting:
            piece = await self._next_piece()
            if piece is None:
                raise StopAsyncIteration
            self.waiting.extend(piece.tokens)
        return self.waiting.popleft()

    async def _next_piece(self) -> Emit | None:
        try:
            piece = await self.batches.receive()
        except trio.EndOfChannel:
            if self.finish is None:
                raise LocalProtocolError("the request ended without saying why: please report it") from None
            if self.finish.error is not None:
                raise self.finish.error from None
            return None
        self.timing.arrived(len(piece.tokens), trio.current_time())
        return piece

    @property
    def finish(self) -> Finish | None:
        """How it ended; None while it goes on."""
        return self.driver.finish

    @property
    def decision(self) -> Decision:
        """The window policy's present decision."""
        return self.machine.decision


class Engine:
    """A coordinator: chooses a chain, drafts, streams. Made by `open_engine`; a service of `dsd_p2p.peers.services`.

    tell: is told what happens to the requests, if it is set.
    """

    def __init__(
        self, links: PeerLinks, drafter: Drafter, vocab_size: int, nursery: trio.Nursery, directory: Directory
    ) -> None:
        self.links = links
        self.drafter = drafter
        self._vocab_size = vocab_size
        self._nursery = nursery
        self._directory = directory
        self._drivers: dict[bytes, RequestDriver] = {}
        self._trackers: dict[tuple[str, ...], Tracker] = {}
        self._last_tracker = Tracker()
        self._asked: dict[tuple[PeerId, bytes], trio.MemorySendChannel[Arrived]] = {}
        self.distrusted: dict[str, float] = {}
        self.tell: Sink | None = None
        self._governor = Governor()
        self._prefixes = PrefixIndex()

    def governed(self, policy: WindowPolicy) -> WindowPolicy:
        """Return a policy that speculates only while that helps all requests together."""
        return GovernedPolicy(policy, self._governor, trio.current_time)

    def observe(self) -> Observation:
        """Return what is measured of the chain that was used last, and of the drafter."""
        return self._last_tracker.observe()

    def _tracker(self, route: Route, experience: str) -> Tracker:
        stages = (f"{hop.peer} {hop.span}" for hop in route.hops)
        name = (experience, self.drafter.name, repr(route.model), *stages)
        self._last_tracker = self._trackers.setdefault(name, Tracker())
        return self._last_tracker

    async def _find_route(self, detour: Detour) -> Route:
        try:
            return await self._directory.find(self._without_liars(detour))
        except ConfigError as exc:
            raise PeerDisconnected(f"a stage is gone: {exc}") from exc

    @asynccontextmanager
    async def generate(
        self, prompt: Sequence[TokenId], options: GenerateOptions, policy: WindowPolicy
    ) -> AsyncIterator[Generation]:
        """Run one request; leaving the block early ends it and frees the stages' caches.

        Raises:
            ConfigError: no chain, an empty prompt, or a prompt and answer longer than the model's context.
        """
        route = await self._directory.find(self._without_liars(NO_DETOUR))
        self._check(prompt, options, route.max_positions)
        request = self._request(prompt, options, route)
        session = request.session
        tracker = self._tracker(route, options.experience)
        machine = RequestMachine(request, route, policy, tracker, random.Random(secrets.randbits(64)))  # noqa: S311
        drafter, drafting = self._open_drafter(request.max_length, options.text.sampling)
        share = _Share(self._governor)
        driver = RequestDriver(
            machine,
            self.links,
            drafting,
            is_instant_drafter=drafter.is_instant,
            find_route=self._find_route,
            auditor=self._auditor(request) if options.audit else None,
            distrust=self._distrust,
            committed=share.committed,
            watch=None if self.tell is None else RequestWatch(machine, self.tell, time.time, drafter.name),
        )
        self._drivers[session] = driver
        output, batches = trio.open_memory_channel[Emit](_OUTPUT_BATCHES)
        # In the engine's nursery, so that the caller's own errors do not come out wrapped in a group.
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
            drafting.close()

    def _request(self, prompt: Sequence[TokenId], options: GenerateOptions, route: Route) -> Request:
        is_parked = bool(options.owner) and not options.audit
        scope = scope_of(options.owner, route, options.hidden_format)
        num_prompt = len(prompt) - options.num_written
        # A parked text stands for tokens of the prompt only: what was written already passes the tail again.
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
        """Remember what the stages hold of a finished answer, and that they do not hold what they were thought to."""
        lost = request.prefix.session if request.prefix is not None and machine.opening.prefix is None else b""
        if lost and (chain := self._prefixes.forget(lost)) is not None:
            self._nursery.start_soon(self._discard, lost, chain)
        if machine.opening.parked is None:
            return
        scope = scope_of(options.owner, machine.route, options.hidden_format)
        tokens = machine.tokens[: machine.opening.parked.num_tokens]
        for session, route in self._prefixes.add(scope, machine.route, request.session, tokens, trio.current_time()):
            self._nursery.start_soon(self._discard, session, route)

    async def _discard(self, session: bytes, route: Route) -> None:
        """Have a parked text thrown away."""
        for hop in route.hops:
            with suppress(PeerError), trio.move_on_after(_ASK_TIMEOUT_S):
                await self.links.send(PeerId(hop.peer), CloseSession(session=session, epoch=MAX_EPOCH))

    def _check(self, prompt: Sequence[TokenId], options: GenerateOptions, limit: int) -> None:
        """Refuse what no chain could do. limit: longest text of this one."""
        if not prompt:
            raise ConfigError("the prompt is empty: give at least one token")
        if max(prompt) >= self._vocab_size or min(prompt) < 0:
            raise ConfigError(f"a prompt token is outside the model's vocabulary of {self._vocab_size}")
        text, num_prompt = options.text, len(prompt) - options.num_written
        if text.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {text.max_tokens}: ask for at least 1")
        if not 0 <= options.num_written < min(len(prompt), text.max_tokens):
            raise ConfigError(
                f"{options.num_written} tokens are written already: fewer than the {len(prompt)} of the prompt and the "
                f"{text.max_tokens} that are asked for"
            )
        if num_prompt + text.max_tokens > limit:
            raise ConfigError(
                f"prompt of {num_prompt} and {text.max_tokens} new tokens exceed the model's context of {limit}: "
                "shorten the prompt or lower --max-tokens"
            )
        check_text_request(text)
        if options.audit and (options.hidden_format is not HiddenFormat.MODEL or text.relaxation is not None):
            raise ConfigError("--audit compares exact rows: leave out --hidden and --verify relaxed")

    def _open_drafter(self, max_length: int, sampling: Sampling) -> tuple[Drafter, DraftSession]:
        """The drafter, or prompt lookup where it has no room for another request: a guess is never worth the answer."""
        try:
            return self.drafter, self.drafter.open(max_length, sampling)
        except CapacityError as exc:
            logger.info("drafter has no room, looking up instead error=%s", exc)
            return _LOOKUP, _LOOKUP.open(max_length, sampling)

    def start(self, nursery: trio.Nursery) -> None:
        """Requests run in the nursery that the engine was made with."""

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """What it does with each message that it takes."""
        return {
            Verdict: self._hear,
            Failure: self._hear,
            Revealed: self._hear_answer,
            Recomputed: self._hear_answer,
        }

    async def _hear(self, event: Arrived, message: Verdict | Failure) -> None:
        """Hand a verdict or failure to the request it belongs to."""
        driver = self._drivers.get(message.session)
        if driver is not None and driver.involves(event.sender):
            self._hand(driver, Told(sender=event.sender, message=message))
        else:
            self.links.transport.penalise(event.sender)

    async def _hear_answer(self, event: Arrived, message: Revealed | Recomputed) -> None:
        name = message.session if isinstance(message, Revealed) else message.request
        if (waiting := self._asked.get((event.sender, name))) is not None:
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                waiting.send_nowait(replace(event, payload=memoryview(bytes(event.payload))))

    # Checking stages

    def _auditor(self, request: Request) -> Auditor:
        rng = random.Random(secrets.randbits(64))  # noqa: S311 - nobody must foresee the turns, which the seed takes care of
        return Auditor(
            session=request.session,
            num_prompt=request.num_prompt,
            text=request.text,
            replicas=self._trusted_replicas,
            ask=self._ask,
            shuffle=rng.shuffle,
        )

    def _trusted_replicas(self, span: Span, but: str) -> list[PeerId]:
        liars = self._without_liars(NO_DETOUR).peers
        return [peer for peer in self._directory.replicas(span, but) if peer not in liars]

    async def _ask(self, peer: PeerId, message: Reveal | Recompute, payload: bytes) -> Arrived:
        """Return a peer's answer.

        Raises:
            PeerTimeout, PeerDisconnected: there was none.
        """
        name = (peer, message.session if isinstance(message, Reveal) else message.request)
        self._asked[name], answers = trio.open_memory_channel[Arrived](1)
        try:
            with trio.fail_after(_ASK_TIMEOUT_S):
                await self.links.send(peer, message, payload)
                return await answers.receive()
        except trio.TooSlowError:
            raise PeerTimeout(f"no answer within {_ASK_TIMEOUT_S:g} s") from None
        finally:
            del self._asked[name]

    def _distrust(self, error: DishonestPeer) -> None:
        """Use the peer no more for a while."""
        logger.error("dishonest peer avoided peer=%s for_s=%.0f error=%s", error.peer, _DISTRUST_S, error)
        self.distrusted[error.peer] = trio.current_time() + _DISTRUST_S

    def _without_liars(self, detour: Detour) -> Detour:
        now_s = trio.current_time()
        liars = {peer for peer, until_s in self.distrusted.items() if until_s > now_s}
        return replace(detour, peers=detour.peers | liars)

    def lost(self, event: Lost) -> None:
        """Tell every request."""
        for driver in self._drivers.values():
            self._hand(driver, event)

    @staticmethod
    def _hand(driver: RequestDriver, event: Told | Lost) -> None:
        try:
            driver.inbox.send_nowait(event)
        except trio.WouldBlock:
            logger.exception("request overrun: event dropped, the stall deadline will end it")


class _Share:
    """A request in the governor's count: from its first token on, because its prompt writes none."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._is_counted = False

    def committed(self, num_tokens: int) -> None:
        """It got tokens."""
        if not self._is_counted:
            self._is_counted = True
            self._governor.joined(trio.current_time())
        self._governor.committed(num_tokens, trio.current_time())

    def left(self) -> None:
        """It is over."""
        if self._is_counted:
            self._governor.left(trio.current_time())


def _formats(hidden_format: HiddenFormat, num_links: int) -> tuple[HiddenFormat, ...]:
    return () if hidden_format is HiddenFormat.MODEL else (hidden_format,) * num_links


@asynccontextmanager
async def open_engine(
    transport: Transport, drafter: Drafter, vocab_size: int
) -> AsyncIterator[tuple[Engine, StageList]]:
    """Run a coordinator on `transport`, and the list of the stages it may use."""
    links = PeerLinks(transport, PeerInfo(peer=transport.peer, addresses=transport.addresses))
    stages = StageList(links)
    async with trio.open_nursery() as nursery:
        engine = Engine(links, drafter, vocab_size, nursery, stages)
        nursery.start_soon(run_services, links, [engine])
        yield engine, stages
        nursery.cancel_scope.cancel()
