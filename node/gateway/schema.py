"""Defines and checks the requests, field by field as OpenAI documents them.

Fields that we do not support are refused by name. Fields that only OpenAI's servers could honour, and that change no
answer, are accepted and ignored.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

MAX_CHOICES = 16
MAX_STOPS = 4

Text = Annotated[str, Meta(max_length=1 << 20)]
ShortText = Annotated[str, Meta(max_length=256)]
Stop = ShortText | Annotated[list[ShortText], Meta(max_length=MAX_STOPS)] | None
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Meta(min_length=1, max_length=1 << 20)]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Meta(max_length=256)] | None = None
    name: ShortText | None = None
    refusal: ShortText | None = None
    tool_call_id: ShortText | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`response_format`; only plain text is supported."""

    type: Literal["text"]


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that both endpoints take. `None` is the default everywhere, as in OpenAI's API."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    user: ShortText | None = None
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, int], Meta(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class ChatRequest(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[msgspec.Raw], Meta(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    metadata: Annotated[dict[ShortText, ShortText], Meta(max_length=64)] | None = None
    store: bool | None = None
    service_tier: ShortText | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    verbosity: ShortText | None = None


class CompletionRequest(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[
            list[Text | Token | Tokens],
            Meta(min_length=1, max_length=1 << 20),
        ]
    )
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Annotated[str, Meta(max_length=0)] | UnsetType | None = UNSET
