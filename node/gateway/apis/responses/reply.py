"""Writes answers in the words of the Responses API."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from node.gateway.apis.responses.request import ResponsesRequest
from node.gateway.choice import Choice, Piece
from node.gateway.errors import ApiError
from node.gateway.frames import EventFrames
from node.gateway.replies import Usage
from node.gateway.tools.calls import Call
from node.gateway.writing import Event, Head

Keep = Callable[[str, str, Sequence[Call]], None]
"""Keeps an answer: its id, its text and its calls."""


_OF_REASONING: dict[str, Any] = {"summary": []}


class ResponsesFormat(EventFrames):
    """The format of `/v1/responses`. keep: called with each answer once it is complete."""

    prefix = "resp_"
    done = b""

    def __init__(self, asked: ResponsesRequest, keep: Keep) -> None:
        self._asked = asked
        self._keep = keep
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._number = 0

    def whole(self, head: Head, choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        ((choice, pieces),) = choices
        for piece in pieces:
            self._grow(piece)
        self._close()
        self._kept(head)
        return self._response(head, _status(choice), usage, choice)

    def first(self, head: Head, index: int) -> Sequence[Event]:
        """Return the first events of an answer."""
        response = self._response(head, "in_progress", None, None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def event(self, head: Head, index: int, piece: Piece) -> Sequence[Event]:
        """Return the events with the next part of an answer."""
        return self._grow(piece)

    def last(self, head: Head, index: int, choice: Choice) -> Sequence[Event]:
        """Return the events that end the answer's last item."""
        return self._close()

    def end(self, head: Head, choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[Event]:
        """Return the event that ends the stream."""
        (choice,) = choices
        self._kept(head)
        status = _status(choice)
        name = "response.completed" if status == "completed" else "response.incomplete"
        return [self._event(name, response=self._response(head, status, usage, choice))]

    def failed(self, error: ApiError) -> Event:
        """Return an error as the last event of a stream."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _kept(self, head: Head) -> None:
        said = "".join(item["content"][0]["text"] for item in self._items if item["type"] == "message")
        calls = [
            Call(id=item["call_id"], name=item["name"], arguments=item["arguments"])
            for item in self._items
            if item["type"] == "function_call"
        ]
        self._keep(head.id, said, calls)

    # Items

    def _grow(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        if piece.reasoning:
            events += self._say("reasoning", "reasoning_text", piece.reasoning)
        if piece.text:
            events += self._say("message", "output_text", piece.text)
        for call in piece.calls:
            events += self._close()
            events += self._called(call)
        return events

    def _say(self, kind: str, part: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events += self._close()
            prefix = "rs" if kind == "reasoning" else "msg"
            item: dict[str, Any] = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
            item |= _OF_REASONING if kind == "reasoning" else {"role": "assistant"}
            events.append(self._event("response.output_item.added", **self._at, item={**item, "content": []}))
            content: dict[str, Any] = {"type": part, "text": ""}
            content |= {} if kind == "reasoning" else {"annotations": [], "logprobs": []}
            events.append(self._event("response.content_part.added", **self._in(item), part=dict(content)))
            self._open = {**item, "content": [content]}
        self._open["content"][0]["text"] += text
        extra: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        events.append(self._event(f"response.{part}.delta", **self._in(self._open), delta=text, **extra))
        return events

    def _close(self) -> list[Event]:
        """Complete the item that is being written, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        part = item["content"][0]
        extra: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": []}
        events = [
            self._event(f"response.{part['type']}.done", **self._in(item), text=part["text"], **extra),
            self._event("response.content_part.done", **self._in(item), part=part),
        ]
        return [*events, self._item_done(item)]

    def _called(self, call: Call) -> list[Event]:
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        at = {"item_id": item["id"], **self._at}
        return [
            self._event("response.output_item.added", **self._at, item=item),
            self._event("response.function_call_arguments.delta", **at, delta=call.arguments),
            self._event("response.function_call_arguments.done", **at, arguments=call.arguments, name=call.name),
            self._item_done({**item, "arguments": call.arguments}),
        ]

    def _item_done(self, item: Mapping[str, Any]) -> Event:
        done = {**item, "status": "completed"}
        event = self._event("response.output_item.done", **self._at, item=done)
        self._items.append(done)
        return event

    @property
    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self._items)}

    def _in(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], **self._at, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _response(self, head: Head, status: str, usage: Usage | None, choice: Choice | None) -> dict[str, Any]:
        asked = self._asked
        sampling = None if choice is None else choice.options.text.sampling
        return {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": head.model,
            "output": list(self._items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature if sampling is None else sampling.temperature,
            "text": {"format": {"type": asked.text.format.type if asked.text and asked.text.format else "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [each for each in asked.tools or () if each.get("type") == "function"],
            "top_p": asked.top_p if sampling is None else sampling.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None if usage is None else _usage(usage, 0 if choice is None else choice.num_reasoning_tokens),
        }


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _usage(usage: Usage, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
