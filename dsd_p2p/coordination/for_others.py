"""Lets a thin client have another peer coordinate its request: the client's side, and the coordinator's.

If the coordinator is lost, the thin client asks another one to go on from the tokens received so far. That is enough,
because the text is a function of prompt, settings and seed.
"""

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress

import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.errors import (
    CapacityError,
    CoverageLost,
    DsdError,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
)
from dsd_p2p.peers.failures import error_of, kind_of
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.peers.services import Handler
from dsd_p2p.session.effects import Emit
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import MAX_TOKEN, PeerId, TokenId, short_peer
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.wire.messages import Answer, AnswerEnd, Ask, FailureKind, Message, StopAnswer

logger = logging.getLogger(__name__)

_ANSWERS = Scopes(what="answers", node=32, root=16, peer=8)
_SEND_TIMEOUT_S = 10.0
_QUEUED_MESSAGES = 1024
_MAX_ATTEMPTS = 4
"""How many coordinators a thin client tries in a row without receiving a token."""


class CoordinatorService:
    """Coordinates requests for thin clients; a service of `dsd_p2p.peers.services`.

    make_policy: makes the window policy of one request.
    """

    def __init__(self, engine: Engine, make_policy: Callable[[], WindowPolicy]) -> None:
        self._engine = engine
        self._make_policy = make_policy
        self._nursery: trio.Nursery | None = None
        self._answers: dict[tuple[PeerId, bytes], trio.CancelScope] = {}

    def start(self, nursery: trio.Nursery) -> None:
        """Run answers in `nursery`."""
        self._nursery = nursery

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of each message type."""
        return {Ask: self._begin, StopAnswer: self._stop}

    async def _begin(self, event: Arrived, ask: Ask) -> None:
        assert self._nursery is not None, "start first"
        name = (event.sender, ask.request)
        if name in self._answers:
            raise RemoteProtocolError("request", ask.request.hex(), "an id that is not in use")
        try:
            _ANSWERS.check(((peer, 1) for peer, _ in self._answers), event.sender, 1, self._engine.links.root_of)
        except CapacityError as exc:
            end = AnswerEnd(request=ask.request, reason="error", error=kind_of(exc), text=str(exc))
            self._nursery.start_soon(self._end, event.sender, end)
            return
        scope = trio.CancelScope(deadline=trio.current_time() + ask.deadline_s)
        self._answers[name] = scope
        self._nursery.start_soon(self._answer, event.sender, ask, scope)

    async def _stop(self, event: Arrived, stop: StopAnswer) -> None:
        if (known := self._answers.get((event.sender, stop.request))) is not None:
            known.cancel()

    def lost(self, event: Lost) -> None:
        """Cancel the answers for a lost client, which frees their routes."""
        for (peer, _), scope in self._answers.items():
            if peer == event.peer:
                scope.cancel()

    async def _answer(self, client: PeerId, ask: Ask, scope: trio.CancelScope) -> None:
        end = AnswerEnd(
            request=ask.request, reason="error", error=kind_of(PeerTimeout()), text="the answer's deadline has passed"
        )
        try:
            with scope:
                end = await self._write(client, ask)
        except DsdError as exc:
            end = AnswerEnd(request=ask.request, reason="error", error=kind_of(exc), text=str(exc)[:512])
        except trio.TooSlowError:
            logger.warning("thin client does not read its answer peer=%s", client)
            return
        except Exception:  # task boundary: one failed answer must not end the process
            logger.exception("answer failed peer=%s", client)
            end = AnswerEnd(
                request=ask.request, reason="error", error=FailureKind.MODEL, text="the coordinator failed; see its log"
            )
        finally:
            del self._answers[client, ask.request]
        await self._end(client, end)

    async def _end(self, client: PeerId, end: AnswerEnd) -> None:
        with suppress(PeerError), trio.move_on_after(_SEND_TIMEOUT_S):
            await self._engine.links.send(client, end)

    async def _write(self, client: PeerId, ask: Ask) -> AnswerEnd:
        options = GenerateOptions(
            text=ask.text,
            num_written=ask.num_written,
            stall_timeout_s=ask.idle_timeout_s,
            owner=f"{client} {ask.owner}" if ask.owner else "",
        )
        start = 0
        async with self._engine.generate(ask.prompt, options, self._engine.governed(self._make_policy())) as generation:
            async for piece in generation.pieces():
                answer = Answer(request=ask.request, start=start, tokens=piece.tokens, logprobs=piece.logprobs)
                with trio.fail_after(_SEND_TIMEOUT_S):
                    await self._engine.links.send(client, answer)
                start += len(piece.tokens)
            reason = generation.finish.reason if generation.finish else "error"
        return AnswerEnd(request=ask.request, reason=reason)


class ThinClient:
    """A client that asks other peers to coordinate its requests; a service of `dsd_p2p.peers.services`.

    choose: takes the peers to avoid and returns the peer to ask next, or None. vocab_size: of the model.
    """

    def __init__(
        self, links: PeerLinks, choose: Callable[[Collection[str]], PeerId | None], vocab_size: int = MAX_TOKEN
    ) -> None:
        self._links = links
        self._vocab_size = vocab_size
        self._choose = choose
        self._waiting: dict[bytes, tuple[PeerId, trio.MemorySendChannel[Answer | AnswerEnd | Lost]]] = {}

    def start(self, nursery: trio.Nursery) -> None:
        """Do nothing: all the work is done in `generate`."""

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of each message type."""
        return {Answer: self._hear, AnswerEnd: self._hear}

    async def _hear(self, event: Arrived, message: Answer | AnswerEnd) -> None:
        """Hand part of an answer to the request that waits for it."""
        coordinator, queue = self._waiting.get(message.request, (None, None))
        if queue is not None and coordinator == event.sender:
            with suppress(trio.BrokenResourceError):
                try:
                    queue.send_nowait(message)
                except trio.WouldBlock:
                    unread = f"more than {_QUEUED_MESSAGES} unread messages"
                    raise RemoteProtocolError("answer", unread, f"at most {_QUEUED_MESSAGES}") from None

    def lost(self, event: Lost) -> None:
        """Report a lost coordinator to the requests that wait for it."""
        for coordinator, queue in self._waiting.values():
            if coordinator == event.peer:
                with suppress(trio.BrokenResourceError, trio.WouldBlock):
                    queue.send_nowait(event)

    async def generate(
        self, prompt: Sequence[TokenId], options: GenerateOptions, deadline_s: float
    ) -> AsyncGenerator[Emit, None]:
        """Yield the answer piece by piece. If a coordinator is lost, ask another to go on after the tokens received.

        Raises:
            CoverageLost: no coordinator is left to ask.
            DsdError: the error of the last coordinator asked.
        """
        received: list[TokenId] = []
        failed: list[str] = []
        while True:
            coordinator = self._choose(failed)
            if coordinator is None:
                raise CoverageLost("no connected peer coordinates requests: draft on this machine with --draft")
            num_before = len(received)
            try:
                async with aclosing(
                    self._ask(coordinator, [*prompt, *received], len(received), options, deadline_s)
                ) as pieces:
                    async for piece in pieces:
                        received += piece.tokens
                        yield Emit(tokens=piece.tokens, logprobs=piece.logprobs)
            except PeerError as exc:
                logger.warning("coordinator lost peer=%s received=%d error=%s", coordinator, len(received), exc)
                failed = [coordinator] if len(received) > num_before else [*failed, coordinator]
                if len(failed) >= _MAX_ATTEMPTS or isinstance(exc, CoverageLost):
                    raise
            else:
                return

    async def _ask(
        self, coordinator: PeerId, prompt: list[TokenId], num_received: int, options: GenerateOptions, deadline_s: float
    ) -> AsyncGenerator[Answer, None]:
        request = secrets.token_bytes(8)
        queue, pieces = trio.open_memory_channel[Answer | AnswerEnd | Lost](_QUEUED_MESSAGES)
        self._waiting[request] = coordinator, queue
        num_expected = 0
        try:
            await self._links.send(
                coordinator,
                Ask(
                    request=request,
                    prompt=tuple(prompt),
                    text=options.text,
                    num_written=num_received,
                    idle_timeout_s=options.stall_timeout_s,
                    deadline_s=deadline_s,
                    owner=options.owner,
                ),
            )
            while True:
                with trio.move_on_after(2 * options.stall_timeout_s) as scope:
                    piece = await pieces.receive()
                if scope.cancelled_caught:
                    raise PeerTimeout(
                        f"coordinator {short_peer(coordinator)} was silent for {2 * options.stall_timeout_s:g} s"
                    )
                match piece:
                    case Answer(start=start, tokens=tokens) as answer:
                        if start != num_expected or num_received + start + len(tokens) > options.text.max_tokens:
                            raise RemoteProtocolError(
                                "answer start", start, f"{num_expected}, within {options.text.max_tokens} tokens"
                            )
                        num_logprobs = len(tokens) if options.text.top_logprobs >= 0 else 0
                        fits = all(each.is_of(options.text.top_logprobs, self._vocab_size) for each in answer.logprobs)
                        if len(answer.logprobs) != num_logprobs or not fits:
                            raise RemoteProtocolError("logprobs", len(answer.logprobs), f"{num_logprobs} entries")
                        num_expected += len(tokens)
                        yield answer
                    case AnswerEnd(error=None):
                        return
                    case AnswerEnd(error=kind, text=text):
                        assert kind is not None
                        raise error_of(kind, text)
                    case Lost(reason=reason):
                        raise PeerDisconnected(f"lost coordinator {short_peer(coordinator)}: {reason}")
        finally:
            del self._waiting[request]
            queue.close()
            pieces.close()
            with trio.CancelScope(shield=True), trio.move_on_after(1), suppress(PeerError):
                await self._links.send(coordinator, StopAnswer(request=request))
