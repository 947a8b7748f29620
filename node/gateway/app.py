"""Defines the gateway's HTTP routes."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.errors import DsdError
from dsd_p2p.models.text import TextCodec
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.telemetry.summary import describe
from dsd_p2p.types import ModelKey, Sampling, TextRequest, TokenId
from node.gateway.admission import Admission, PatientBackend
from node.gateway.backend import Backend
from node.gateway.body import Asked, read_body
from node.gateway.choice import Choice
from node.gateway.errors import ApiError, api_error, json_response, unexpected
from node.gateway.formats import ChatFormat, TextFormat
from node.gateway.hosts import OnlyHosts
from node.gateway.keys import Client, Clients
from node.gateway.openapi import openapi_document
from node.gateway.replies import Defaults, Model, ModelList
from node.gateway.schema import MAX_CHOICES, ChatRequest, Common, CompletionRequest
from node.gateway.stream import EventStream
from node.gateway.writing import Writing, WritingOptions
from node.watch.hub import EventHub

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response | Writing | EventStream]]

_SERVED = "send POST requests to /v1/chat/completions or /v1/completions, and GET requests to /v1/models"
_DEFAULT_TEXT_TOKENS = 16
"""The default of OpenAI's completions endpoint."""


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
    sampling: what a request that does not say how to sample gets.
    """

    name: str
    key: ModelKey
    max_positions: int
    vocab_size: int
    text: TextCodec
    sampling: Sampling


@dataclass(slots=True, kw_only=True)
class Gateway:
    """The gateway and everything its routes use.

    metrics: returns Prometheus' text format. note: called when an answered request has ended. note_refused: called with
    the status when a request is refused.
    """

    backend: Backend
    served: Served
    clients: Clients
    hub: EventHub
    metrics: Callable[[], bytes]
    is_ready: Callable[[], bool]
    note: Callable[[Writing, int], None] = lambda _writing, _status: None
    note_refused: Callable[[int], None] = lambda _status: None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    stall_timeout_s: float = 60.0
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    admission: Admission = field(init=False)
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        limits = self.limits
        self.admission = Admission(
            max_running=limits.max_running, max_waiting=limits.max_waiting, timeout_s=limits.wait_s
        )
        self.backend = PatientBackend(self.backend, limits.wait_s)

    def app(self, hosts: Sequence[str]) -> ASGIApp:
        """Return the ASGI application.

        hosts: the names that the gateway may be called by. Others are refused, so that no other site can point its name
        here.
        """
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models), methods=["GET"]),
                Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
                Route("/v1/status", self._guarded(self._status), methods=["GET"]),
                Route("/v1/events", self._guarded(self._events), methods=["GET"]),
                Route("/openapi.json", self._openapi, methods=["GET"]),
                Route("/healthz", self._health, methods=["GET"]),
                Route("/readyz", self._ready, methods=["GET"]),
                Route("/metrics", self._guarded(self._metrics), methods=["GET"]),
                Route("/", self._page, methods=["GET"]),
            ],
            middleware=[Middleware(OnlyHosts, hosts=hosts)],
            exception_handlers={HTTPException: _http_error, Exception: _unexpected},
        )

    def _guarded(self, handler: Callable[[Request, Client], Awaitable[Response | Writing | EventStream]]) -> Handler:
        """Wrap a handler: identify the client first, and answer errors in OpenAI's format."""

        async def guarded(request: Request) -> Response | Writing | EventStream:
            try:
                return await handler(request, self.clients.identify(request.headers))
            except ApiError as exc:
                error = exc
            except DsdError as exc:
                error = api_error(exc)
            self.note_refused(error.status)
            return error.response()

        return guarded

    # Answers

    async def _chat(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self._read(request, ChatRequest)
        messages = [message.for_template() for message in asked.messages]
        encode = self.served.text.encode_chat
        prompt = await trio.to_thread.run_sync(encode, messages, asked.chat_template_kwargs)
        top_logprobs = (asked.top_logprobs or 0) if asked.logprobs else -1
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        room = self.served.max_positions - len(prompt)
        max_tokens = max_tokens or max(1, min(self.limits.default_tokens, room))
        options = self._options(client, asked, max_tokens, top_logprobs)
        return self._writing(client, asked, [prompt], options, ChatFormat(self.served.text), ignored)

    async def _complete(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self._read(request, CompletionRequest)
        prompts = await trio.to_thread.run_sync(self._prompts, asked)
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise ApiError(400, "best_of other than n is not supported", param="best_of")
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported: the prompt is not verified", param="echo")
        top_logprobs = -1 if asked.logprobs is None else asked.logprobs
        options = self._options(client, asked, asked.max_tokens or _DEFAULT_TEXT_TOKENS, top_logprobs)
        text = self.served.text
        self._check_prompts(prompts, options, "prompt")
        echoed = [text.decode(prompt) if asked.echo else "" for prompt in prompts]
        echoes = [echo for echo in echoed for _ in range(asked.n or 1)]
        return self._writing(client, asked, prompts, options, TextFormat(text, echoes), ignored)

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

    def _options(self, client: Client, asked: Common, max_tokens: int, top_logprobs: int) -> GenerateOptions:
        usual = self.served.sampling
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
                stop_tokens=self.served.text.stop_tokens,
                top_logprobs=top_logprobs,
            ),
            stall_timeout_s=self.stall_timeout_s,
            retry=self.retry,
            owner=client.name,
        )

    def _writing(
        self,
        client: Client,
        asked: Common,
        prompts: Sequence[Sequence[TokenId]],
        options: GenerateOptions,
        form: ChatFormat | TextFormat,
        ignored: Sequence[str],
    ) -> Writing:
        n = asked.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise ApiError(
                400, f"n: expected at most {MAX_CHOICES} answers over all prompts, got {len(prompts) * n}", param="n"
            )
        num_prompt_tokens = sum(map(len, prompts))
        self._check_prompts(prompts, options, "messages" if isinstance(form, ChatFormat) else "prompt")
        client.take(num_prompt_tokens)
        choices = [
            Choice(
                backend=self.backend,
                text=self.served.text,
                prompt=prompt,
                options=_with_seed(options, number),
                stops=asked.stops,
            )
            for prompt in prompts
            for number in range(n)
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
                headers={"x-dsd-ignored": ", ".join(ignored)} if ignored else {},
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

    async def _read(self, request: Request, kind: type[Asked]) -> tuple[Asked, list[str]]:
        """Return what is asked of our model, and the names of fields that are ignored."""
        limits = self.limits
        asked, ignored = await read_body(request, kind, max_bytes=limits.max_body_bytes, is_strict=limits.is_strict)
        if asked.model not in (self.served.name, self.served.name.rpartition("/")[2]):
            raise _no_model(asked.model, self.served.name)
        return asked, ignored

    # The rest

    async def _models(self, _request: Request, _client: Client) -> Response:
        return json_response(ModelList(data=[self._described()]))

    async def _model(self, request: Request, _client: Client) -> Response:
        if request.path_params["name"] != self.served.name:
            raise _no_model(request.path_params["name"], self.served.name)
        return json_response(self._described())

    def _described(self) -> Model:
        served = self.served
        return Model(
            id=served.name,
            created=self.started_at,
            owned_by="dsd-p2p",
            max_model_len=served.max_positions,
            weights=served.key.weights,
            compute=served.key.compute,
            defaults=Defaults(
                temperature=served.sampling.temperature,
                top_k=served.sampling.top_k,
                top_p=served.sampling.top_p,
                max_tokens=self.limits.default_tokens,
            ),
        )

    async def _status(self, _request: Request, _client: Client) -> Response:
        self.hub.tick()
        return json_response(describe(self.hub.picture))

    async def _events(self, request: Request, _client: Client) -> EventStream:
        return EventStream(self.hub)

    async def _openapi(self, _request: Request) -> Response:
        return json_response(openapi_document(version("dsd-p2p"), needs_key=self.clients.need_keys))

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        is_ready = self.is_ready()
        return json_response({"status": "ready" if is_ready else "no route of stages"}, 200 if is_ready else 503)

    async def _metrics(self, _request: Request, _client: Client) -> Response:
        return Response(self.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, _request: Request) -> Response:
        page = files("node").joinpath("data/page.html").read_bytes()
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers = {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-cache"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _with_seed(options: GenerateOptions, number: int) -> GenerateOptions:
    """Return the options with another seed, for the `number`-th answer to a prompt."""
    sampling = options.text.sampling
    sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + number) & ((1 << 63) - 1))
    return replace(options, text=msgspec.structs.replace(options.text, sampling=sampling))


def _no_model(asked: str, served: str) -> ApiError:
    return ApiError(
        404, f"model {asked!r} is not served here: ask for {served!r}", code="model_not_found", param="model"
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is no {request.url.path} here: {_SERVED}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} does not answer {request.method}: {_SERVED}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("request failed path=%s", request.url.path, exc_info=error)
    return unexpected().response()
