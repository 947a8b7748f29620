"""Defines and checks the requests, field by field as OpenAI documents them.

What clients send has more fields than what we can honour. `null` and the neutral value of a field are accepted
everywhere. A value that would change the answer in a way that we cannot is refused by name. A field that is not
defined here is ignored; the reply names it, and `--strict` refuses it.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from dsd_p2p.types import MAX_BUDGET

MAX_CHOICES = 16
MAX_STOPS = 4

Text = Annotated[str, Meta(max_length=1 << 20)]
ShortText = Annotated[str, Meta(max_length=256)]
Stop = ShortText | Annotated[list[ShortText], Meta(max_length=MAX_STOPS)] | None
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenText = Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Tokens = Annotated[list[Token], Meta(min_length=1, max_length=1 << 20)]


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a tool call; arguments: a JSON object as text."""

    name: ShortText
    arguments: Text = "{}"


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an earlier answer made."""

    function: FunctionCall
    id: ShortText = ""
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Meta(max_length=256)] | None = None
    name: ShortText | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: ShortText | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    def for_template(self) -> dict[str, object]:
        """Return the message with the names that chat templates know."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, object] = {"role": role, "content": self.text}
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = msgspec.to_builtins(self.tool_calls)
        return message


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """`response_format.json_schema`. strict: accepted; every schema is kept to."""

    schema: dict[str, Any] = {}
    name: ShortText = ""
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`response_format`: text, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """`structured_outputs`, as vLLM has it: one of a JSON schema, a regular expression, a list of texts, a grammar."""

    json: dict[str, Any] | Text | None = None
    regex: Text | None = None
    choice: Annotated[list[ShortText], Meta(min_length=1, max_length=256)] | None = None
    grammar: Text | None = None


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the answer may call. strict: accepted; see docs/api.md for when arguments keep to the schema."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a function."""

    name: ShortText


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice`: the tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ForModel(msgspec.Struct, frozen=True, kw_only=True):
    """A request that names a model."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]


class Common(ForModel, frozen=True, kw_only=True):  # size: the fields are OpenAI's
    """The fields that both endpoints take. `None` is the default everywhere, as in OpenAI's API."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    user: ShortText | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Meta(max_length=1024)] | None = None
    audit: bool | None = None
    relaxed: Annotated[float, Meta(ge=0, le=MAX_BUDGET)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class ChatRequest(Common, frozen=True, kw_only=True):  # size: the fields are OpenAI's
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: Annotated[list[msgspec.Raw], Meta(max_length=0)] | None = None
    chat_template_kwargs: Annotated[dict[ShortText, Any], Meta(max_length=64)] | None = None
    metadata: Annotated[dict[ShortText, Any], Meta(max_length=64)] | None = None
    store: bool | None = None
    service_tier: ShortText | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    verbosity: ShortText | None = None


class CompletionRequest(Common, frozen=True, kw_only=True):
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


class TokenizeRequest(ForModel, frozen=True, kw_only=True):
    """`POST /tokenize`, as vLLM has it: a text, or messages in the model's chat template."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    chat_template_kwargs: Annotated[dict[ShortText, Any], Meta(max_length=64)] | None = None


def unknown_fields(body: bytes | bytearray, kind: type[msgspec.Struct]) -> list[str]:
    """Return the names of a request's fields that are not defined here."""
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    return sorted(set(msgspec.json.decode(body, type=dict[str, msgspec.Raw])) - known)
