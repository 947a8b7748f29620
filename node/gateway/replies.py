"""Defines the replies, field by field as OpenAI documents them. Only `usage.speculation` and `usage.audit` are ours."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from dsd_p2p.coordination.statistics import AnswerStatistics


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer was made; times in seconds.

    coordinator: the peer that wrote it, empty for this one. For another peer's answers only speed and `ttft_s` are
    known.
    """

    mode: str = ""
    drafter: str = ""
    coordinator: str = ""
    tokens_per_s: float = 0.0
    ttft_s: float = 0.0
    mean_accepted_length: float = 0.0
    num_windows: int = 0
    num_drafted: int = 0
    num_misses: int = 0
    num_stale: int = 0
    num_relaxed: int = 0
    relaxed_nats: float = 0.0
    num_replays: int = 0
    bytes_per_token: float = 0.0


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """`usage.prompt_tokens_details`.

    cached_tokens: prompt tokens whose cache the stages still held; 0 if another peer wrote the answer.
    """

    cached_tokens: int = 0


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked of an answer. num_checks: stages' checks. is_checked: True if every row of every stage was."""

    num_checks: int
    is_checked: bool


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """`usage`. speculation, audit: one entry for each choice; audit only if the request asked for it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    speculation: list[Speculation] = []
    audit: list[Audited] | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answer's tokens and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledName(msgspec.Struct, frozen=True, kw_only=True):
    """The function of a call. arguments: a JSON object as text."""

    name: str
    arguments: str


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that the answer makes."""

    id: str
    function: CalledName
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. content: null if there are only calls. reasoning_content: what the model thought."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledFunction] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: None = None


class NamedDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The new part of a call's function."""

    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The new part of a call."""

    index: int
    id: str | None = None
    type: str | None = None
    function: NamedDelta | None = None


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The new part of a streamed answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a chunk that belongs to one answer."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """`logprobs` of a text choice: lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continued text, or the new part of it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `/v1/completions`, and each event of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets that does not set these fields. top_k: 0 means all tokens."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that clients can ask for.

    max_model_len: the most tokens of prompt and answer together, by the name that other servers use for it.
    weights, compute: the formats in which its weights are stored and its layers compute.
    """

    id: str
    created: int
    owned_by: str
    max_model_len: int
    weights: str
    compute: str
    defaults: Defaults
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `/v1/models`."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The details of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to a request that failed."""

    error: ErrorBody


def speculation_of(statistics: AnswerStatistics | None) -> Speculation:
    """Return what a client is told about how its answer was written: all zeros and blanks if it has no token."""
    if statistics is None:
        return Speculation()
    timing, details = statistics.timing, statistics.details
    known = Speculation(
        coordinator=statistics.coordinator or "",
        tokens_per_s=round(timing.tokens_per_s, 3),
        ttft_s=round(timing.ttft_s, 4),
    )
    if details is None:
        return known
    counts = details.counts
    return msgspec.structs.replace(
        known,
        mode=details.decision.mode,
        drafter=details.drafter,
        mean_accepted_length=round(details.mean_accepted_length, 3),
        num_windows=counts.num_windows,
        num_drafted=counts.num_drafted_nodes,
        num_misses=counts.num_misses,
        num_stale=counts.num_stale_nodes,
        num_relaxed=counts.num_relaxed_tokens,
        relaxed_nats=round(counts.relaxed_nats, 6),
        num_replays=counts.num_replays,
        bytes_per_token=round(details.bytes_per_token, 1),
    )


def audited_of(statistics: AnswerStatistics | None) -> Audited:
    """Return what was checked of an audited answer."""
    details = statistics.details if statistics else None
    if details is None:
        return Audited(num_checks=0, is_checked=False)
    return Audited(num_checks=details.num_checks or 0, is_checked=bool(details.is_checked))
