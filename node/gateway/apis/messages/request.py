"""Defines the requests of `/v1/messages` and turns them into chats."""

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
    FunctionCall,
    FunctionTool,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ShortText,
    Text,
    ToolCall,
)

_Blocks = Annotated[list[dict[str, Any]], Meta(max_length=1024)]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: Text | _Blocks


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: ShortText = ""
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: ShortText | None = None


class CountRequest(ForModel, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=2048)]
    system: Text | _Blocks | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[ShortText, Any] | None = None

    @property
    def unserved_tools(self) -> list[str]:
        """The kinds of tools that we do not run, such as web search; the model is not told of them."""
        return sorted({f"tools.{each.get('type')}" for each in self.tools or () if not _is_function(each)})

    def chat(self) -> ChatRequest:
        """Return the same request as a chat.

        Raises:
            ApiError: it has parts that cannot be served.
        """
        system = [ChatMessage(role="system", content=_text(self.system))] if self.system else []
        choice = self.tool_choice
        chosen: Any = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type) if choice else None
        if choice is not None and choice.type == "tool":
            chosen = NamedTool(type="function", function=NamedFunction(name=choice.name))
        return ChatRequest(
            model=self.model,
            messages=[*system, *(each for message in self.messages for each in _messages(message))],
            tools=[_tool(each) for each in self.tools or () if _is_function(each)],
            tool_choice=chosen,
            parallel_tool_calls=not choice.disable_parallel_tool_use if choice else None,
            chat_template_kwargs=_thinking(self.thinking),
        )


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    stop_sequences: Annotated[list[ShortText], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    output_config: OutputConfig | None = None
    metadata: dict[ShortText, Any] | None = None
    service_tier: ShortText | None = None

    def chat(self) -> ChatRequest:
        """Return the same request as a chat. Raises as `CountRequest.chat` does."""
        return msgspec.structs.replace(
            super().chat(),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            response_format=ResponseFormat(
                type="json_schema", json_schema=JsonSchema(schema=self.output_config.format.schema)
            )
            if self.output_config and self.output_config.format
            else None,
        )


def _messages(message: Message) -> list[ChatMessage]:
    """Return a message as one or more of a chat: results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[ChatMessage] = []
    for block in message.content:
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text") or ""))
            case "tool_use":
                arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
                function = FunctionCall(name=str(block.get("name", "")), arguments=arguments)
                calls.append(ToolCall(id=str(block.get("id", "")), function=function))
            case "tool_result":
                text, call_id = _text(block.get("content", "")), str(block.get("tool_use_id", ""))
                results.append(ChatMessage(role="tool", content=text, tool_call_id=call_id))
            case "thinking" | "redacted_thinking":
                # What the model thought before is not shown to it again.
                pass
            case kind:
                raise ApiError(400, f"messages: blocks of type {kind!r} are not supported", param="messages")
    said = "".join(texts)
    if said or calls or not results:
        results.append(ChatMessage(role=message.role, content=said, tool_calls=calls or None))
    return results


def _text(content: Any) -> str:
    """Return a content, which is a text or a list of blocks, as one text."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in content if isinstance(content, Sequence) else ():
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else block
            raise ApiError(400, f"messages: blocks of type {kind!r} are not supported here", param="messages")
        texts.append(str(block.get("text") or ""))
    return "".join(texts)


def _is_function(tool: dict[str, Any]) -> bool:
    return tool.get("type") in (None, "custom")


def _tool(given: dict[str, Any]) -> FunctionTool:
    fields = {
        "name": given.get("name"),
        "description": given.get("description"),
        "parameters": given.get("input_schema"),
    }
    try:
        return FunctionTool(type="function", function=msgspec.convert(fields, Function))
    except msgspec.ValidationError as exc:
        raise ApiError(400, f"tools: {exc}", param="tools") from exc


def _thinking(asked: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what tells templates whether to think; those that do not know it ignore it."""
    return None if asked is None else {"enable_thinking": asked.get("type") != "disabled"}
