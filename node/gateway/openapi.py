"""Describes the endpoints as an OpenAPI document, generated from the types that check requests."""

from typing import Any

import msgspec

from node.gateway.replies import ChatCompletion, Error, Model, ModelList, TextCompletion
from node.gateway.schema import ChatRequest, CompletionRequest

_TYPES = (ChatRequest, CompletionRequest, ChatCompletion, TextCompletion, Model, ModelList, Error)
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
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("Answer in a chat", named["ChatCompletion"], named, asked="ChatRequest")
            },
            "/v1/completions": {
                "post": _operation("Continue a text", named["TextCompletion"], named, asked="CompletionRequest")
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
        },
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(
    summary: str,
    reply: dict[str, Any],
    named: dict[str, Any],
    asked: str = "",
    also: frozenset[str] | set[str] = frozenset(),
) -> dict[str, Any]:
    error = {"application/json": {"schema": named["Error"]}}
    responses: dict[str, Any] = {
        "200": {"description": "done", "content": {"application/json": {"schema": reply}}},
        **{code: {"description": text, "content": error} for code, text in _ERRORS.items() if code not in also},
        **{code: {"description": _ERRORS[code], "content": {"application/json": {"schema": reply}}} for code in also},
    }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if asked:
        responses["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": named[asked]}},
        }
    return operation
