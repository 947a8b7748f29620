"""Describes the endpoints as an OpenAPI document, generated from the types that check requests."""

from typing import Any

import msgspec

from node.gateway.apis.messages.request import CountRequest, MessagesRequest
from node.gateway.apis.ollama.request import OllamaChat
from node.gateway.apis.responses.request import ResponsesRequest
from node.gateway.replies import ChatCompletion, Error, Model, ModelList, TextCompletion, Tokenized
from node.gateway.schema import ChatRequest, CompletionRequest, TokenizeRequest

_TYPES = (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
    OllamaChat,
    TokenizeRequest,
    ChatCompletion,
    TextCompletion,
    Tokenized,
    Model,
    ModelList,
    Error,
)
_ERRORS = {
    "400": "the request is wrong",
    "401": "a key is needed",
    "404": "there is no such model",
    "405": "not this method",
    "408": "the request did not arrive in time",
    "413": "the request is too long",
    "415": "not JSON",
    "429": "too much, or too busy: `Retry-After` tells when to come back",
    "500": "the gateway or the model failed",
    "503": "the swarm cannot answer now",
    "504": "the swarm took too long",
}

_OBJECT = {"type": "object"}
_RESPONSE = {"type": "object", "required": ["id", "object", "status", "output"]}
_MESSAGE = {"type": "object", "required": ["id", "type", "role", "content", "stop_reason", "usage"]}
_COUNT = {"type": "object", "required": ["input_tokens"], "properties": {"input_tokens": {"type": "integer"}}}
_LINE = {"type": "object", "required": ["model", "message", "done"]}
_ANTHROPIC_ERROR = {"type": "object", "required": ["type", "error"]}
_OLLAMA_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}

_EVENT = {
    "type": "object",
    "description": "One server-sent event: a chunk as JSON, or [DONE].",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def openapi_document(version: str, *, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    schemas, components = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    named = dict(zip((each.__name__ for each in _TYPES), schemas, strict=True))
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "dsd-p2p", "version": version, "description": "OpenAI's endpoints over a swarm of peers."},
        "paths": _paths(named),
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(named: dict[str, Any]) -> dict[str, Any]:
    return {
        "/v1/chat/completions": {
            "post": _operation("Answer in a chat", named["ChatCompletion"], named, asked="ChatRequest")
        },
        "/v1/completions": {
            "post": _operation("Continue a text", named["TextCompletion"], named, asked="CompletionRequest")
        },
        "/v1/responses": {
            "post": _operation("Answer, in OpenAI's Responses API", _RESPONSE, named, asked="ResponsesRequest")
        },
        "/v1/messages": {
            "post": _operation(
                "Answer, in Anthropic's Messages API",
                _MESSAGE,
                named,
                asked="MessagesRequest",
                error=_ANTHROPIC_ERROR,
            )
        },
        "/v1/messages/count_tokens": {
            "post": _operation(
                "Count a conversation's tokens",
                _COUNT,
                named,
                asked="CountRequest",
                error=_ANTHROPIC_ERROR,
                stream="",
            )
        },
        "/api/chat": {
            "post": _operation(
                "Answer, in Ollama's API",
                _LINE,
                named,
                asked="OllamaChat",
                error=_OLLAMA_ERROR,
                stream="application/x-ndjson",
            )
        },
        "/api/tags": {"get": _operation("List models, in Ollama's API", _OBJECT, named, error=_OLLAMA_ERROR)},
        "/tokenize": {
            "post": _operation("Return tokens", named["Tokenized"], named, asked="TokenizeRequest", stream="")
        },
        "/v1/models": {"get": _operation("List models", named["ModelList"], named)},
        "/v1/models/{model}": {
            "get": {
                **_operation("Describe a model", named["Model"], named),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                ],
            }
        },
        "/v1/status": {"get": _operation("A picture of the swarm", {"type": "object"}, named)},
        "/healthz": {"get": _operation("Is the gateway alive?", {"type": "object"}, named)},
        "/readyz": {"get": _operation("Can requests be answered?", {"type": "object"}, named, also={"503"})},
    }


def _operation(
    summary: str,
    reply: dict[str, Any],
    named: dict[str, Any],
    asked: str = "",
    also: frozenset[str] | set[str] = frozenset(),
    error: dict[str, Any] | None = None,
    stream: str = "text/event-stream",
) -> dict[str, Any]:
    """Describe an operation. also: codes of errors that come with the reply. stream: the type of a streamed answer."""
    told = {"application/json": {"schema": error or named["Error"]}}
    responses: dict[str, Any] = {
        "200": {"description": "done", "content": {"application/json": {"schema": reply}}},
        **{code: {"description": text, "content": told} for code, text in _ERRORS.items() if code not in also},
        **{code: {"description": _ERRORS[code], "content": {"application/json": {"schema": reply}}} for code in also},
    }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if asked:
        if stream:
            responses["200"]["content"][stream] = {"schema": _EVENT if stream == "text/event-stream" else reply}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": named[asked]}},
        }
    return operation
