"""Defines the gateway's HTTP routes."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dsd_p2p.errors import DsdError
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.telemetry.summary import describe
from node.gateway.admission import Admission, PatientBackend
from node.gateway.answering import Answering, GatewayLimits, Served
from node.gateway.apis.messages.reply import MessagesFormat, anthropic_body
from node.gateway.apis.messages.request import CountRequest, MessagesRequest
from node.gateway.apis.ollama.reply import OllamaFormat, ollama_body, tags
from node.gateway.apis.ollama.request import OllamaChat
from node.gateway.apis.responses.kept import KeptConversations
from node.gateway.apis.responses.reply import ResponsesFormat
from node.gateway.apis.responses.request import ResponsesRequest
from node.gateway.backend import Backend
from node.gateway.errors import ApiError, api_error, json_response, unexpected
from node.gateway.formats import ChatFormat
from node.gateway.hosts import OnlyHosts
from node.gateway.keys import Client, Clients
from node.gateway.openapi import openapi_document
from node.gateway.replies import Defaults, Model, ModelList, Tokenized
from node.gateway.schema import ChatMessage, ChatRequest, CompletionRequest, FunctionCall, TokenizeRequest, ToolCall
from node.gateway.stream import EventStream
from node.gateway.tools.calls import Call
from node.gateway.writing import Writing
from node.watch.hub import EventHub

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response | Writing | EventStream]]

_SERVED = (
    "send POST requests to /v1/chat/completions, /v1/completions, /v1/responses or /v1/messages, and GET requests to "
    "/v1/models"
)


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
    answering: Answering = field(init=False)
    conversations: KeptConversations = field(default_factory=KeptConversations)
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        limits = self.limits
        self.answering = Answering(
            backend=PatientBackend(self.backend, limits.wait_s),
            served=self.served,
            limits=limits,
            admission=Admission(
                max_running=limits.max_running, max_waiting=limits.max_waiting, timeout_s=limits.wait_s
            ),
            retry=self.retry,
            stall_timeout_s=self.stall_timeout_s,
            note=lambda writing, status: self.note(writing, status),
        )

    def app(self, hosts: Sequence[str]) -> ASGIApp:
        """Return the ASGI application.

        hosts: the names that the gateway may be called by. Others are refused, so that no other site can point its name
        here.
        """
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
                Route("/v1/responses", self._guarded(self._responses), methods=["POST"]),
                Route("/v1/messages", self._guarded(self._messages, anthropic_body), methods=["POST"]),
                Route("/v1/messages/count_tokens", self._guarded(self._count, anthropic_body), methods=["POST"]),
                Route("/api/chat", self._guarded(self._ollama_chat, ollama_body), methods=["POST"]),
                Route("/api/tags", self._guarded(self._tags, ollama_body), methods=["GET"]),
                Route("/tokenize", self._guarded(self._tokenize), methods=["POST"]),
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

    def _guarded(
        self,
        handler: Callable[[Request, Client], Awaitable[Response | Writing | EventStream]],
        body_of: Callable[[ApiError], object] = lambda error: error.body,
    ) -> Handler:
        """Wrap a handler: identify the client first, and answer errors in the words of the API."""

        async def guarded(request: Request) -> Response | Writing | EventStream:
            try:
                return await handler(request, self.clients.identify(request.headers))
            except ApiError as exc:
                error = exc
            except DsdError as exc:
                error = api_error(exc)
            except RecursionError:
                error = ApiError(400, "the request is nested too deeply", code="invalid_request")
            self.note_refused(error.status)
            return json_response(body_of(error), error.status, error.headers)

        return guarded

    async def _chat(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self.answering.read(request, ChatRequest)
        return await self.answering.chat(client, asked, ChatFormat(self.served.text), ignored)

    async def _complete(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self.answering.read(request, CompletionRequest)
        return await self.answering.complete(client, asked, ignored)

    async def _responses(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self.answering.read(request, ResponsesRequest)
        earlier = self.conversations.of(client.name, asked.previous_response_id) if asked.previous_response_id else []
        chat = asked.chat(earlier)
        # Instructions hold for one answer only, so they are not kept.
        said = chat.messages[1:] if asked.instructions else chat.messages
        keep = partial(self._keep, client, said) if asked.store is not False else _keep_nothing
        form = ResponsesFormat(asked, keep)
        return await self.answering.chat(client, chat, form, [*ignored, *asked.unserved_tools], fits_length=True)

    def _keep(
        self, client: Client, said: Sequence[ChatMessage], response: str, text: str, calls: Sequence[Call]
    ) -> None:
        made = [ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments)) for call in calls]
        answer = ChatMessage(role="assistant", content=text, tool_calls=made or None)
        self.conversations.keep(client.name, response, [*said, answer])

    async def _messages(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self.answering.read(request, MessagesRequest)
        return await self.answering.chat(
            client, asked.chat(), MessagesFormat(), [*ignored, *asked.unserved_tools], fits_length=True
        )

    async def _ollama_chat(self, request: Request, client: Client) -> Writing:
        client.begin()
        asked, ignored = await self.answering.read(request, OllamaChat)
        return await self.answering.chat(client, asked.chat(), OllamaFormat(), ignored, fits_length=True)

    async def _tags(self, _request: Request, _client: Client) -> Response:
        return json_response(tags(self.served.name, self.served.key, self.started_at))

    async def _tokenize(self, request: Request, client: Client) -> Response:
        client.begin()
        asked, _ = await self.answering.read(request, TokenizeRequest)
        tokens = await self.answering.tokens(asked)
        return json_response(Tokenized(count=len(tokens), max_model_len=self.served.max_positions, tokens=tokens))

    async def _count(self, request: Request, client: Client) -> Response:
        client.begin()
        asked, _ = await self.answering.read(request, CountRequest)
        return json_response({"input_tokens": len(await self.answering.prompt(asked.chat()))})

    async def _models(self, _request: Request, _client: Client) -> Response:
        return json_response(ModelList(data=[self._described()]))

    async def _model(self, request: Request, _client: Client) -> Response:
        self.served.check_name(request.path_params["name"])
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

    async def _status(self, _request: Request, client: Client) -> Response:
        client.check_watch()
        self.hub.tick()
        return json_response(describe(self.hub.picture))

    async def _events(self, request: Request, client: Client) -> EventStream:
        client.check_watch()
        return EventStream(self.hub)

    async def _openapi(self, _request: Request) -> Response:
        return json_response(openapi_document(version("dsd-p2p"), needs_key=self.clients.need_keys))

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        is_ready = self.is_ready()
        return json_response({"status": "ready" if is_ready else "no route of stages"}, 200 if is_ready else 503)

    async def _metrics(self, _request: Request, client: Client) -> Response:
        client.check_watch()
        return Response(self.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, _request: Request) -> Response:
        page = files("node").joinpath("data/page.html").read_bytes()
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers = {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-cache"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _keep_nothing(_response: str, _text: str, _calls: Sequence[Call]) -> None:
    """Keep nothing: the client asked for that."""


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
