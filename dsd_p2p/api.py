"""Uses a swarm from Python: `Swarm` is for asyncio and trio, `SyncSwarm` for programs without an event loop.

The engine runs under trio in its own thread, so callers can use any event loop or none.
"""

import logging
import queue
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio.to_thread
import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.open import load_coordinator_model, open_coordinator
from dsd_p2p.errors import ConfigError, DsdError, LocalProtocolError, PeerTimeout, first_cause
from dsd_p2p.models.progress import NoProgress, Progress
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.types import Sampling, TextRequest, TokenId
from dsd_p2p.window.named import adaptive_policy

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 1.0
_OWNER = "api"
"""The owner of parked text: a program's later requests can go on from its earlier ones."""

Prompt = str | Sequence[TokenId] | Sequence[Mapping[str, str]]
"""A user's message, a list of tokens, or a conversation: messages with "role" and "content"."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    text: the text that the token completes. It can be empty, because a character can take several tokens.
    """

    id: TokenId
    text: str


class SyncSwarm:
    """A coordinator on a running swarm, for programs without an event loop.

    connect: the address of any of the swarm's peers, or several. model: the target, for its tokenizer and drafter.
    draft: a drafter's name (`dsd_p2p.drafting.named`). dtype: the stages' weights format; "auto": whatever they have.

    Use it in a `with` block. Several threads may generate at the same time.
    """

    def __init__(
        self,
        connect: str | Sequence[str],
        *,
        model: str = "smollm2-135m",
        draft: str = "auto",
        dtype: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self._addresses = [connect] if isinstance(connect, str) else list(connect)
        self._model, self._draft, self._dtype = model, draft, dtype
        self._progress = progress or NoProgress()
        self._thread = threading.Thread(target=self._run, name="dsd-swarm", daemon=True)
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._scope: trio.CancelScope | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            DsdError: the model cannot be loaded, or no peer can be reached.
        """
        self._thread.start()
        error: BaseException | None
        try:
            error = self._ready.get(timeout=_START_TIMEOUT_S)
        except queue.Empty:
            error = PeerTimeout(f"the swarm was not reached within {_START_TIMEOUT_S:g} s")
        except BaseException:
            self.close()
            raise
        if error is not None:
            self.close()
            raise error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel all running requests and stop the engine's thread."""
        self.close()
        self._thread.join(_STOP_TIMEOUT_S)

    def close(self) -> None:
        """Stop the engine, even if it is still starting, without waiting for it."""
        self._is_closed = True
        if self._token is not None and self._scope is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[Token]:
        """Yield an answer's tokens as they are committed. Close the generator to cancel the request.

        Raises:
            DsdError: the request failed. The tokens yielded before remain valid.
        """
        answer = self._begin(prompt, max_tokens, Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed))
        try:
            while (token := answer.next(None)) is not None:
                yield token
        finally:
            answer.stop()

    def _begin(self, prompt: Prompt, max_tokens: int, sampling: Sampling) -> "_Answer":
        if self._token is None:
            raise LocalProtocolError("use the swarm with `with` or `async with`")
        answer = _Answer(self._token)
        options = GenerateOptions(
            text=TextRequest(max_tokens=max_tokens, sampling=sampling, stop_tokens=self._text.stop_tokens), owner=_OWNER
        )
        tokens = self._encode(prompt)
        try:
            self._token.run_sync_soon(self._start_writing, tokens, options, answer)
        except trio.RunFinishedError:
            raise LocalProtocolError("the swarm is closed") from None
        return answer

    def _encode(self, prompt: Prompt) -> list[TokenId]:
        if isinstance(prompt, str):
            return self._text.encode(prompt, is_raw=False)
        if all(isinstance(each, int) for each in prompt):
            return [each for each in prompt if isinstance(each, int)]
        messages = [each for each in prompt if isinstance(each, Mapping)]
        if len(messages) != len(prompt):
            raise ConfigError("the prompt is of the wrong type: give a text, a list of tokens, or a list of messages")
        return self._text.encode_chat(messages)

    # In the engine's thread

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as exc:
            self._ready.put(first_cause(exc))

    async def _serve(self) -> None:
        model = load_coordinator_model(self._model, self._draft, self._progress)
        self._text = model.text
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            if self._is_closed:
                return
            async with AsyncExitStack() as stack:
                self._engine: Engine
                self._engine, _ = await stack.enter_async_context(
                    open_coordinator(model, self._dtype, self._addresses, LinkModel())
                )
                self._nursery = await stack.enter_async_context(trio.open_nursery())
                self._ready.put(None)
                await trio.sleep_forever()

    def _start_writing(self, prompt: list[TokenId], options: GenerateOptions, answer: "_Answer") -> None:
        try:
            self._nursery.start_soon(self._write, prompt, options, answer)
        except RuntimeError:
            answer.pieces.put(LocalProtocolError("the swarm is closed"))

    async def _write(self, prompt: list[TokenId], options: GenerateOptions, answer: "_Answer") -> None:
        streamer = self._text.streamer()
        error: DsdError | None = LocalProtocolError("the swarm was closed")
        try:
            with answer.scope:
                policy = self._engine.governed(adaptive_policy("learned"))
                async with self._engine.generate(prompt, options, policy) as generation:
                    num_left = options.text.max_tokens
                    async for token in generation:
                        num_left -= 1
                        is_stop = token in options.text.stop_tokens
                        text = "" if is_stop else streamer.step(token)
                        if is_stop or num_left == 0:
                            text += streamer.finish()
                        # A stop token is passed on only if it completes held text, such as bytes of a character.
                        if text or not is_stop:
                            answer.pieces.put(Token(token, text))
                error = None
        except DsdError as exc:
            error = exc
        except Exception as exc:  # task boundary: one failed answer must not end the others
            logger.exception("answer failed")
            error = LocalProtocolError(f"the answer failed: {exc!r}")
        finally:
            answer.pieces.put(error)


class _Answer:
    """A queue that passes an answer's tokens from the engine's thread to the caller."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self.pieces: queue.SimpleQueue[Token | DsdError | None] = queue.SimpleQueue()
        self.scope = trio.CancelScope()
        self._token = token

    def next(self, timeout_s: float | None) -> Token | None:
        """Return the next token, or None at the end.

        Raises:
            queue.Empty: no token came within `timeout_s`.
            DsdError: the request failed.
        """
        piece = self.pieces.get(timeout=timeout_s)
        if isinstance(piece, DsdError):
            raise piece
        return piece

    def stop(self) -> None:
        """Cancel the request."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.scope.cancel)


class Swarm:
    """A coordinator on a running swarm, for asyncio and trio, with the parameters of `SyncSwarm`.

    Use it in an `async with` block.
    """

    def __init__(
        self,
        connect: str | Sequence[str],
        *,
        model: str = "smollm2-135m",
        draft: str = "auto",
        dtype: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self._swarm = SyncSwarm(connect, model=model, draft=draft, dtype=dtype, progress=progress)

    async def __aenter__(self) -> Self:
        """Connect; raises the errors of `SyncSwarm.__enter__`."""
        try:
            await anyio.to_thread.run_sync(self._swarm.__enter__, abandon_on_cancel=True)
        except BaseException:
            self._swarm.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel all running requests and stop the engine's thread."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._swarm.__exit__, None, None, None)

    async def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> AsyncGenerator[Token, None]:
        """Yield an answer's tokens as they are committed. Close the generator to cancel the request.

        Raises:
            DsdError: the request failed. The tokens yielded before remain valid.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        answer = self._swarm._begin(prompt, max_tokens, sampling)
        # A separate limiter, so that waiting answers do not use up the shared pool of threads.
        limiter = anyio.CapacityLimiter(1)
        try:
            while True:
                with suppress(queue.Empty):
                    # The wait is bounded, so a cancelled caller leaves a thread behind only until it ends.
                    token = await anyio.to_thread.run_sync(
                        answer.next, _POLL_S, abandon_on_cancel=True, limiter=limiter
                    )
                    if token is None:
                        return
                    yield token
        finally:
            answer.stop()
