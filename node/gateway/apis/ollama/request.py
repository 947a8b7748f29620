"""Defines the requests of `/api/chat` and turns them into chats."""

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from node.gateway.schema import (
    ChatMessage,
    ChatRequest,
    ForModel,
    FunctionCall,
    FunctionTool,
    JsonSchema,
    ResponseFormat,
    ShortText,
    Text,
    ToolCall,
)


class OllamaFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a call; Ollama sends its arguments as an object."""

    name: ShortText
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an earlier answer made."""

    function: OllamaFunction


class OllamaMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    images: Annotated[list[Any], Meta(max_length=0)] | None = None
    tool_calls: Annotated[list[OllamaCall], Meta(max_length=128)] | None = None
    tool_name: ShortText | None = None

    def chat(self) -> ChatMessage:
        """Return the message as one of a chat."""
        calls = [
            ToolCall(
                function=FunctionCall(
                    name=each.function.name, arguments=json.dumps(each.function.arguments, ensure_ascii=False)
                )
            )
            for each in self.tool_calls or ()
        ]
        return ChatMessage(role=self.role, content=self.content or "", tool_calls=calls or None)


class OllamaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`options`: those that change an answer. Others are ignored."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    num_predict: Annotated[int, Meta(ge=-2, le=1 << 20)] | None = None
    stop: Annotated[list[ShortText], Meta(max_length=16)] | ShortText | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None


class OllamaChat(ForModel, frozen=True, kw_only=True):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], Meta(min_length=1, max_length=2048)]
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    think: bool | ShortText | None = None
    keep_alive: Any = None

    def chat(self) -> ChatRequest:
        """Return the same request as a chat."""
        options = self.options or OllamaOptions()
        wanted = options.num_predict
        return ChatRequest(
            model=self.model,
            messages=[message.chat() for message in self.messages],
            # Ollama's clients expect a stream unless they say otherwise.
            stream=self.stream is not False,
            tools=self.tools,
            response_format=_format(self.format),
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            max_tokens=wanted if wanted and wanted > 0 else None,
            stop=options.stop,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            chat_template_kwargs=None if self.think is None else {"enable_thinking": bool(self.think)},
        )


def _format(asked: str | dict[str, Any] | None) -> ResponseFormat | None:
    if not asked:
        return None
    if isinstance(asked, str):
        return ResponseFormat(type="json_object")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=asked))
