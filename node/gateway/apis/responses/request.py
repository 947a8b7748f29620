"""Defines the requests of `/v1/responses` and turns them into chats."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from node.gateway.errors import ApiError
from node.gateway.schema import (
    ChatMessage,
    ChatRequest,
    ForModel,
    Function,
    FunctionTool,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ShortText,
    Text,
)

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`text.format`: like a chat's `response_format`, but flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: ShortText = ""
    schema: dict[str, Any] | None = None
    description: Text | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`text`."""

    format: TextFormat | None = None
    verbosity: ShortText | None = None


class ToolName(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice`: the tool that must be called."""

    type: Literal["function"]
    name: ShortText


class ResponsesRequest(ForModel, frozen=True, kw_only=True):  # size: the fields are OpenAI's
    """`POST /v1/responses`."""

    input: Text | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=2048)]
    instructions: Text | None = None
    previous_response_id: ShortText | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: dict[ShortText, Any] | None = None
    store: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    metadata: Annotated[dict[ShortText, Any], Meta(max_length=64)] | None = None
    reasoning: dict[ShortText, Any] | None = None
    include: list[ShortText] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: ShortText | None = None
    user: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None

    def chat(self, earlier: Sequence[ChatMessage]) -> ChatRequest:
        """Return the same request as a chat. earlier: the conversation that it goes on from.

        Raises:
            ApiError: it has parts that cannot be served.
        """
        given: list[dict[str, Any]] = (
            [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        )
        instructions = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        choice = self.tool_choice
        return ChatRequest(
            model=self.model,
            messages=[*instructions, *earlier, *messages_of(given)],
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stream=self.stream,
            tools=[tool for each in self.tools or () if (tool := _tool(each)) is not None],
            tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
            if isinstance(choice, ToolName)
            else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(self.text.format) if self.text and self.text.format else None,
        )

    @property
    def unserved_tools(self) -> list[str]:
        """The kinds of tools that we do not run, such as web search; the model is not told of them."""
        return sorted({f"tools.{each.get('type')}" for each in self.tools or () if each.get("type") != "function"})


def messages_of(items: Sequence[dict[str, Any]]) -> list[ChatMessage]:
    """Return the items of a conversation as messages of a chat.

    Raises:
        ApiError: an item is of a kind that cannot be served.
    """
    found: list[ChatMessage] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            found.append(_message(item))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id", ""), "function": function}
            is_later = bool(found) and found[-1].role == "assistant"
            before = msgspec.to_builtins(found.pop()) if is_later else {"role": "assistant", "content": ""}
            found.append(_checked({**before, "tool_calls": [*(before.get("tool_calls") or ()), call]}))
        elif kind == "function_call_output":
            text = _text(item.get("output", ""))
            found.append(_checked({"role": "tool", "content": text, "tool_call_id": item.get("call_id", "")}))
        elif kind == "item_reference":
            raise ApiError(400, "input: items are not kept; send them whole, as with store: false", param="input")
        elif kind != "reasoning":
            raise ApiError(400, f"input: items of type {kind!r} are not supported", param="input")
    return found


def _message(item: dict[str, Any]) -> ChatMessage:
    return _checked({"role": item.get("role"), "content": _text(item.get("content", ""))})


def _checked(message: dict[str, Any]) -> ChatMessage:
    try:
        return msgspec.convert(message, ChatMessage)
    except msgspec.ValidationError as exc:
        raise ApiError(400, f"input: {exc}", param="input") from exc


def _text(content: Any) -> str:
    """Return a content, which is a text or a list of parts, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise ApiError(400, f"input: content of type {kind!r} is not supported; only text is", param="input")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
    return "".join(texts)


def _tool(given: dict[str, Any]) -> FunctionTool | None:
    if given.get("type") != "function":
        return None
    try:
        return FunctionTool(type="function", function=msgspec.convert(given, Function))
    except msgspec.ValidationError as exc:
        raise ApiError(400, f"tools: {exc}", param="tools") from exc


def _format(format_: TextFormat) -> ResponseFormat:
    if format_.type != "json_schema":
        return ResponseFormat(type=format_.type)
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=format_.name, schema=format_.schema or {}))
