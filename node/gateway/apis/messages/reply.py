"""Writes answers in the words of the Messages API."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from node.gateway.choice import Choice, Piece
from node.gateway.errors import ApiError
from node.gateway.frames import EventFrames
from node.gateway.replies import Usage
from node.gateway.tools.calls import Call
from node.gateway.writing import Event, Head

_KINDS = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Return Anthropic's error object."""
    kind = _KINDS.get(HTTPStatus(error.status))
    if kind is None:
        kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessagesFormat(EventFrames):
    """The format of `/v1/messages`."""

    prefix = "msg_"
    done = b""

    def __init__(self) -> None:
        self._num_blocks = 0
        self._open = ""

    def whole(self, head: Head, choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        ((choice, pieces),) = choices
        content: list[dict[str, Any]] = []
        thinking, text = "".join(each.reasoning for each in pieces), "".join(each.text for each in pieces)
        if thinking:
            content.append({"type": "thinking", "thinking": thinking, "signature": ""})
        if text:
            content.append({"type": "text", "text": text})
        content += [_tool_use(call, call.given) for call in choice.calls]
        return {**_message(head), "content": content, **_ending(choice), "usage": _usage(usage)}

    def first(self, head: Head, index: int) -> Sequence[Event]:
        """Return the first event of an answer."""
        usage = {"input_tokens": head.num_prompt_tokens, "output_tokens": 0}
        message = {**_message(head), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}]

    def event(self, head: Head, index: int, piece: Piece) -> Sequence[Event]:
        """Return the events with the next part of an answer."""
        events: list[Event] = []
        if piece.reasoning:
            start = {"type": "thinking", "thinking": "", "signature": ""}
            events += self._grow("thinking", start, {"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.text:
            events += self._grow("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": piece.text})
        for call in piece.calls:
            events += self._close()
            events += self._grow(
                "tool_use", _tool_use(call, {}), {"type": "input_json_delta", "partial_json": call.arguments}
            )
        return events

    def last(self, head: Head, index: int, choice: Choice) -> Sequence[Event]:
        """Return the events that end the last block."""
        return self._close()

    def end(self, head: Head, choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[Event]:
        """Return the events that end the stream."""
        (choice,) = choices
        return [{"type": "message_delta", "delta": _ending(choice), "usage": _usage(usage)}, {"type": "message_stop"}]

    def error(self, error: ApiError) -> object:
        """Return an error as a reply."""
        return anthropic_body(error)

    def failed(self, error: ApiError) -> Event:
        """Return an error as the last event of a stream."""
        return anthropic_body(error)

    def _grow(self, kind: str, start: Event, delta: Event) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events += self._close()
            self._open = kind
            events.append({"type": "content_block_start", "index": self._num_blocks, "content_block": start})
        events.append({"type": "content_block_delta", "index": self._num_blocks, "delta": delta})
        return events

    def _close(self) -> list[Event]:
        if not self._open:
            return []
        self._open = ""
        self._num_blocks += 1
        return [{"type": "content_block_stop", "index": self._num_blocks - 1}]


def _message(head: Head) -> dict[str, Any]:
    return {"id": head.id, "type": "message", "role": "assistant", "model": head.model}


def _tool_use(call: Call, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _ending(choice: Choice) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = "stop_sequence" if choice.stopped_by else reasons.get(choice.finish_reason or "", "end_turn")
    return {"stop_reason": reason, "stop_sequence": choice.stopped_by or None}


def _usage(usage: Usage) -> dict[str, Any]:
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": max(0, usage.prompt_tokens - cached),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
