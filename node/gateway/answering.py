"""Turns requests for answers into writings: checks them, encodes prompts, and chooses how to send the answers."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import trio
from starlette.requests import Request

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.models.text import TextCodec
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.types import Constraint, ModelKey, Sampling, TextRequest, TokenId
from dsd_p2p.verification.grammar import Grammars
from node.config.relaxation import bundled_relaxation
from node.gateway.admission import Admission
from node.gateway.backend import Backend
from node.gateway.body import Asked, as_header, read_body
from node.gateway.choice import Choice
from node.gateway.errors import ApiError
from node.gateway.formats import TextFormat
from node.gateway.keys import Client
from node.gateway.schema import MAX_CHOICES, ChatRequest, Common, CompletionRequest, TokenizeRequest
from node.gateway.shaping import constraint_of, shaping_of, tools_of, with_seen
from node.gateway.tools.reading import THINK, AnswerReader, Thoughts
from node.gateway.tools.styles import CallStyle, style_of
from node.gateway.writing import Format, Noted, Writing, WritingOptions

_DEFAULT_TEXT_TOKENS = 16
"""The default of OpenAI's completions endpoint."""

_MAX_NAMED = 16
"""Ignored fields that a reply names."""

_PROMPT_END = 16
"""The last tokens of a prompt, in which a template may have begun the model's reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """The limits of the gateway.

    max_body_bytes: of one request. max_running, max_waiting: numbers of answers. wait_s: the longest wait for a place.
    deadline_s: the longest time for a whole answer. default_tokens: the length of a chat answer if the request sets
    none. is_strict: refuse fields that we do not know instead of ignoring them.
    """

    max_body_bytes: int = 4 << 20
    max_running: int = 16
    max_waiting: int = 256
    wait_s: float = 120.0
    deadline_s: float = 3600.0
    default_tokens: int = 512
    is_strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model behind the gateway.

    name: the name that clients ask for. max_positions: the size of its context. vocab_size: the number of its tokens.
    sampling: what a request that does not say how to sample gets. grammars: compiles constraints for its tokens.
    """

    name: str
    key: ModelKey
    max_positions: int
    vocab_size: int
    text: TextCodec
    sampling: Sampling
    grammars: Grammars

    @property
    def style(self) -> CallStyle:
        """How the model is told of tools and writes calls."""
        return style_of(self.text.template)

    def check_name(self, asked: str) -> None:
        """Check that a request asks for this model.

        Raises:
            ApiError: 404.
        """
        # Ollama's clients add a tag to names without one.
        if asked.removesuffix(":latest") not in (self.name, self.name.rpartition("/")[2]):
            message = f"model {asked!r} is not served here: ask for {self.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """What all endpoints that answer share.

    note: called when an answered request has ended. compiling: how many constraints are compiled at once.
    """

    backend: Backend
    served: Served
    limits: GatewayLimits
    admission: Admission
    retry: RetryPolicy
    stall_timeout_s: float
    note: Noted
    compiling: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, 2))

    async def read(self, request: Request, kind: type[Asked]) -> tuple[Asked, list[str]]:
        """Return what is asked of our model, and the names of fields that are ignored.

        Raises:
            ApiError: the request is wrong.
        """
        limits = self.limits
        asked, ignored = await read_body(request, kind, max_bytes=limits.max_body_bytes, is_strict=limits.is_strict)
        self.served.check_name(asked.model)
        return asked, ignored

    async def chat(
        self,
        client: Client,
        asked: ChatRequest,
        form: Format,
        ignored: Sequence[str] = (),
        *,
        fits_length: bool = False,
    ) -> Writing:
        """Return the answers to a conversation, to be sent in the format `form`.

        fits_length: shorten the answer to what the context has room for, instead of refusing the request. Clients of APIs
            that must name a length name one of the models that they know.

        Raises:
            ApiError, DsdError: the request cannot be served.
        """
        served, style, tools = self.served, self.served.style, tools_of(asked)
        prompt = await self.prompt(asked)
        top_logprobs = (asked.top_logprobs or 0) if asked.logprobs else -1
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        room = served.max_positions - len(prompt)
        if fits_length:
            max_tokens = max(1, min(max_tokens or room, room))
        max_tokens = max_tokens or max(1, min(self.limits.default_tokens, room))
        constraint = constraint_of(asked, tools, style)
        options = self._options(client, asked, max_tokens, top_logprobs, constraint)
        # An answer of a given form has that form from its first token on, so nothing is thought before.
        thinks = THINK in served.text.template and constraint is None
        is_thinking = thinks and served.text.decode(prompt[-_PROMPT_END:]).rstrip().endswith(THINK)
        readers = [
            AnswerReader(
                style.reader(tools) if tools else None,
                Thoughts(is_thinking=is_thinking) if thinks else None,
                max_calls=1 if asked.parallel_tool_calls is False else 0,
            )
            for _ in range(asked.n or 1)
        ]
        return await self._writing(client, asked, [prompt], options, form, ignored, readers)

    async def prompt(self, asked: ChatRequest) -> list[TokenId]:
        """Return the tokens of a conversation and its tools.

        Raises:
            ApiError, DsdError: the request cannot be served.
        """
        style, tools = self.served.style, tools_of(asked)
        if not self.served.text.template:
            raise ApiError(400, "this model has no chat template: continue a text with /v1/completions", param="model")
        messages = style.with_tools([message.for_template() for message in asked.messages], tools)
        described = [tool.described for tool in tools] if style.is_native else []
        encode = self.served.text.encode_chat
        return await trio.to_thread.run_sync(encode, messages, asked.chat_template_kwargs, described)

    async def tokens(self, asked: TokenizeRequest) -> list[TokenId]:
        """Return the tokens of a text or a conversation.

        Raises:
            ApiError, DsdError: the request cannot be served.
        """
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give a prompt or messages, and not both", param="prompt")
        if asked.messages is None:
            return await trio.to_thread.run_sync(partial(self.served.text.encode, asked.prompt or "", is_raw=True))
        chat = ChatRequest(
            model=asked.model,
            messages=asked.messages,
            tools=asked.tools,
            chat_template_kwargs=asked.chat_template_kwargs,
        )
        return await self.prompt(chat)

    async def complete(self, client: Client, asked: CompletionRequest, ignored: Sequence[str]) -> Writing:
        """Return the continuations of texts.

        Raises:
            ApiError, DsdError: the request cannot be served.
        """
        prompts = await trio.to_thread.run_sync(self._prompts, asked)
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise ApiError(400, "best_of other than n is not supported", param="best_of")
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported: the prompt is not verified", param="echo")
        top_logprobs = -1 if asked.logprobs is None else asked.logprobs
        constraint = constraint_of(asked, (), self.served.style)
        max_tokens = asked.max_tokens or _DEFAULT_TEXT_TOKENS
        options = self._options(client, asked, max_tokens, top_logprobs, constraint)
        text = self.served.text
        self._check_prompts(prompts, options, "prompt")
        echoed = [text.decode(prompt) if asked.echo else "" for prompt in prompts]
        echoes = [echo for echo in echoed for _ in range(asked.n or 1)]
        readers = [AnswerReader() for _ in echoes]
        return await self._writing(client, asked, prompts, options, TextFormat(text, echoes), ignored, readers)

    def _prompts(self, asked: CompletionRequest) -> list[list[TokenId]]:
        """Return the prompts as tokens, from any of the four forms that OpenAI accepts."""
        given = asked.prompt
        entries: Sequence[object] = [given] if isinstance(given, str) else given
        if all(isinstance(entry, int) for entry in entries):
            entries = [entries]
        if not all(isinstance(entry, str | list | tuple) for entry in entries):
            raise ApiError(
                400,
                "prompt: expected only texts or only tokens, got a mixture: send them in separate requests",
                param="prompt",
            )
        if len(entries) > MAX_CHOICES:
            raise ApiError(400, f"prompt: expected at most {MAX_CHOICES} prompts, got {len(entries)}", param="prompt")
        encode = self.served.text.encode
        return [
            encode(entry, is_raw=True) if isinstance(entry, str) else [int(token) for token in entry]  # type: ignore[attr-defined]
            for entry in entries
        ]

    def _options(
        self, client: Client, asked: Common, max_tokens: int, top_logprobs: int, constraint: Constraint | None
    ) -> GenerateOptions:
        if asked.audit and asked.relaxed:
            raise ApiError(400, "relaxed: an audited answer is exact: leave out relaxed or audit", param="relaxed")
        usual, stop_tokens = self.served.sampling, self.served.text.stop_tokens
        sampling = Sampling(
            temperature=usual.temperature if asked.temperature is None else asked.temperature,
            top_k=usual.top_k if asked.top_k is None else max(asked.top_k, 0),
            # OpenAI accepts 0; it means the likeliest token alone.
            top_p=usual.top_p if asked.top_p is None else max(asked.top_p, 1e-6),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed & ((1 << 63) - 1),
        )
        return GenerateOptions(
            text=TextRequest(
                max_tokens=max_tokens,
                sampling=sampling,
                stop_tokens=stop_tokens,
                top_logprobs=top_logprobs,
                shaping=shaping_of(asked),
                constraint=constraint,
                relaxation=bundled_relaxation(asked.relaxed) if asked.relaxed else None,
            ),
            stall_timeout_s=self.stall_timeout_s,
            retry=self.retry,
            owner=client.name,
            audit=bool(asked.audit),
        )

    async def _writing(
        self,
        client: Client,
        asked: Common,
        prompts: Sequence[Sequence[TokenId]],
        options: GenerateOptions,
        form: Format,
        ignored: Sequence[str],
        readers: Sequence[AnswerReader],
    ) -> Writing:
        n = asked.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise ApiError(
                400, f"n: expected at most {MAX_CHOICES} answers over all prompts, got {len(prompts) * n}", param="n"
            )
        num_prompt_tokens = sum(map(len, prompts))
        self._check_prompts(prompts, options, "messages" if isinstance(asked, ChatRequest) else "prompt")
        client.take(num_prompt_tokens)
        if options.text.constraint is not None:
            # What is wrong with it is told before anything runs. The compiled form is kept for the answer.
            grammar = self.served.grammars.grammar(options.text.constraint, options.text.stop_tokens)
            await trio.to_thread.run_sync(grammar.start, limiter=self.compiling)
        numbered = [(prompt, number) for prompt in prompts for number in range(n)]
        choices = [
            Choice(
                backend=self.backend,
                text=self.served.text,
                prompt=prompt,
                options=_for_choice(options, prompt, number),
                stops=asked.stops,
                reader=reader,
            )
            for (prompt, number), reader in zip(numbered, readers, strict=True)
        ]
        return Writing(
            choices,
            form,
            WritingOptions(
                model=asked.model,
                fingerprint=f"fp_{self.served.key.digest[:12]}_{self.served.key.weights}",
                is_stream=bool(asked.stream),
                with_usage=bool(asked.stream_options and asked.stream_options.include_usage),
                deadline_s=self.limits.deadline_s,
                is_audited=bool(asked.audit),
                headers={"x-dsd-ignored": ", ".join(map(as_header, ignored[:_MAX_NAMED]))} if ignored else {},
            ),
            client=client,
            admission=self.admission,
            num_prompt_tokens=num_prompt_tokens,
            note=self.note,
        )

    def _check_prompts(self, prompts: Sequence[Sequence[TokenId]], options: GenerateOptions, param: str) -> None:
        if not all(prompts):
            raise ApiError(400, f"{param}: expected at least one token, got none", param=param)
        if max(map(max, prompts)) >= self.served.vocab_size or min(map(min, prompts)) < 0:
            raise ApiError(400, f"{param}: the model's tokens are 0 to {self.served.vocab_size - 1}", param=param)
        longest = max(map(len, prompts))
        if longest + options.text.max_tokens > self.served.max_positions:
            raise ApiError(
                400,
                f"the model's context is {self.served.max_positions} tokens: the prompt has {longest}, "
                f"{options.text.max_tokens} more were asked for: shorten one of them",
                code="context_length_exceeded",
                param=param,
            )


def _for_choice(options: GenerateOptions, prompt: Sequence[TokenId], number: int) -> GenerateOptions:
    """Return the options of the `number`-th answer to a prompt, which has a seed of its own."""
    sampling = options.text.sampling
    text = msgspec.structs.replace(
        options.text,
        sampling=msgspec.structs.replace(sampling, seed=(sampling.seed + number) & ((1 << 63) - 1)),
        shaping=with_seen(options.text.shaping, prompt),
    )
    return replace(options, text=text)
