"""Writes answers in the words of Ollama's API: one JSON object on each line."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from dsd_p2p.types import ModelKey
from node.gateway.choice import Choice, Piece
from node.gateway.errors import ApiError
from node.gateway.replies import Usage
from node.gateway.tools.calls import Call
from node.gateway.writing import Head


class OllamaFormat:
    """The format of `/api/chat`."""

    prefix = ""
    content_type = "application/x-ndjson"
    beat = b""
    done = b""

    def __init__(self) -> None:
        self._started_ns = time.monotonic_ns()

    def framed(self, event: object) -> bytes:
        """Return an event as a line."""
        return msgspec.json.encode(event) + b"\n"

    def whole(self, head: Head, choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        ((choice, pieces),) = choices
        text, thinking = "".join(each.text for each in pieces), "".join(each.reasoning for each in pieces)
        return self._line(head, _message(text, thinking, choice.calls)) | self._ending(choice, usage)

    def first(self, head: Head, index: int) -> Sequence[object]:
        """Return nothing: a stream begins with its first text."""
        return []

    def event(self, head: Head, index: int, piece: Piece) -> Sequence[object]:
        """Return the line with the next part of an answer."""
        message = _message(piece.text, piece.reasoning, piece.calls)
        return [self._line(head, message) | {"done": False}] if len(message) > 2 or piece.text else []

    def last(self, head: Head, index: int, choice: Choice) -> Sequence[object]:
        """Return nothing: the last line also has the token counts."""
        return []

    def end(self, head: Head, choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[object]:
        """Return the last line."""
        (choice,) = choices
        return [self._line(head, _message("", "", ())) | self._ending(choice, usage)]

    def error(self, error: ApiError) -> object:
        """Return an error as a reply."""
        return ollama_body(error)

    def failed(self, error: ApiError) -> object:
        """Return an error as the last line."""
        return ollama_body(error)

    @staticmethod
    def _line(head: Head, message: dict[str, Any]) -> dict[str, Any]:
        return {"model": head.model, "created_at": _iso(head.created), "message": message}

    def _ending(self, choice: Choice, usage: Usage) -> dict[str, Any]:
        statistics = choice.outcome.statistics
        total_ns = time.monotonic_ns() - self._started_ns
        first_ns = round(1e9 * statistics.timing.ttft_s) if statistics else 0
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": total_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first_ns,
            "eval_count": usage.completion_tokens,
            "eval_duration": max(0, total_ns - first_ns),
        }


def ollama_body(error: ApiError) -> dict[str, str]:
    """Return Ollama's error object."""
    return {"error": error.message}


def tags(name: str, key: ModelKey, started_at: int) -> dict[str, Any]:
    """Return the reply of `/api/tags`: the one model of the swarm."""
    details = {"format": "dsd", "family": "", "parameter_size": "", "quantization_level": key.weights}
    model = {
        "name": name,
        "model": name,
        "modified_at": _iso(started_at),
        "size": 0,
        "digest": key.digest,
        "details": details,
    }
    return {"models": [model]}


def _message(text: str, thinking: str, calls: Sequence[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.given}} for call in calls]
    return message


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
