"""Writes answers in the formats of the two endpoints."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET

from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId, TokenLogprobs
from node.gateway.choice import Choice, Piece
from node.gateway.frames import EventFrames
from node.gateway.replies import (
    AssistantMessage,
    CallDelta,
    CalledFunction,
    CalledName,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    NamedDelta,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from node.gateway.writing import Head

DONE = b"data: [DONE]\n\n"


class ChatFormat(EventFrames):
    """The format of `/v1/chat/completions`."""

    prefix = "chatcmpl-"
    done = DONE

    def __init__(self, text: TextCodec) -> None:
        self._text = text
        self._num_calls: dict[int, int] = defaultdict(int)

    def whole(self, head: Head, choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.fingerprint,
            usage=usage,
            choices=[
                ChatChoice(
                    index=index,
                    message=_said(choice, pieces),
                    finish_reason=_reason(choice),
                    logprobs=self._logprobs(choice, pieces),
                )
                for index, (choice, pieces) in enumerate(choices)
            ],
        )

    def first(self, head: Head, index: int) -> Sequence[object]:
        """Return the first event of an answer."""
        return [self._chunk(head, [ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])]

    def event(self, head: Head, index: int, piece: Piece) -> Sequence[object]:
        """Return the events with the next part of an answer: its text, and for each call its name and its arguments."""
        content = [self._token(token, each) for token, each in zip(piece.tokens, piece.logprobs, strict=False)]
        logprobs = ChatLogprobs(content=content) if content else None
        deltas: list[Delta] = []
        if piece.text or content:
            deltas.append(Delta(content=piece.text))
        if piece.reasoning:
            deltas.insert(0, Delta(reasoning_content=piece.reasoning))
        for call in piece.calls:
            number = self._num_calls[index]
            self._num_calls[index] += 1
            named = CallDelta(
                index=number, id=call.id, type="function", function=NamedDelta(name=call.name, arguments="")
            )
            given = CallDelta(index=number, function=NamedDelta(arguments=call.arguments))
            deltas += [Delta(tool_calls=[named]), Delta(tool_calls=[given])]
        return [
            self._chunk(
                head, [ChunkChoice(index=index, delta=delta, logprobs=logprobs if delta.content is not None else None)]
            )
            for delta in deltas
        ]

    def last(self, head: Head, index: int, choice: Choice) -> Sequence[object]:
        """Return the last event of an answer."""
        return [self._chunk(head, [ChunkChoice(index=index, delta=Delta(), finish_reason=choice.finish_reason)])]

    def end(self, head: Head, choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[object]:
        """Return the event with the token counts, if the client wants it."""
        return [self._chunk(head, [], usage)] if with_usage else []

    @staticmethod
    def _chunk(head: Head, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, choice: Choice, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if choice.options.text.top_logprobs < 0:
            return None
        pairs = ((token, each) for piece in pieces for token, each in zip(piece.tokens, piece.logprobs, strict=True))
        return ChatLogprobs(content=[self._token(*pair) for pair in pairs])

    def _token(self, token: TokenId, logprobs: TokenLogprobs) -> TokenLogprob:
        top = [
            TopLogprob(token=text, logprob=_ln(millinats), bytes=_bytes(text))
            for text, millinats in (
                (self._text.token_text(each), value)
                for each, value in zip(logprobs.top, logprobs.top_millinats, strict=False)
            )
        ]
        text = self._text.token_text(token)
        return TokenLogprob(token=text, logprob=_ln(logprobs.millinats), bytes=_bytes(text), top_logprobs=top)


class TextFormat(EventFrames):
    """The format of `/v1/completions`.

    echoes: for each choice, the prompt if the client wants it repeated, otherwise empty.
    """

    prefix = "cmpl-"
    done = DONE

    def __init__(self, text: TextCodec, echoes: Sequence[str]) -> None:
        self._text = text
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]

    def whole(self, head: Head, choices: Sequence[tuple[Choice, list[Piece]]], usage: Usage) -> object:
        """Return the whole reply."""
        replies = [
            TextChoice(
                index=index,
                text=self._echoes[index] + "".join(piece.text for piece in pieces),
                finish_reason="length" if choice.finish_reason == "length" else "stop",
                logprobs=self._logprobs(pieces, len(self._echoes[index]))
                if choice.options.text.top_logprobs >= 0
                else None,
            )
            for index, (choice, pieces) in enumerate(choices)
        ]
        return self._completion(head, replies, usage)

    def first(self, head: Head, index: int) -> Sequence[object]:
        """Return the event that repeats the prompt, if the client wants it."""
        echo = self._echoes[index]
        return [self._completion(head, [TextChoice(index=index, text=echo, finish_reason=None)])] if echo else []

    def event(self, head: Head, index: int, piece: Piece) -> Sequence[object]:
        """Return the event with the next part of an answer."""
        logprobs = self._logprobs([piece], self._offsets[index]) if piece.logprobs else None
        self._offsets[index] += sum(len(self._text.token_text(token)) for token in piece.tokens)
        return [
            self._completion(head, [TextChoice(index=index, text=piece.text, finish_reason=None, logprobs=logprobs)])
        ]

    def last(self, head: Head, index: int, choice: Choice) -> Sequence[object]:
        """Return the last event of an answer."""
        reason = "length" if choice.finish_reason == "length" else "stop"
        return [self._completion(head, [TextChoice(index=index, text="", finish_reason=reason)])]  # type: ignore[arg-type]

    def end(self, head: Head, choices: Sequence[Choice], usage: Usage, *, with_usage: bool) -> Sequence[object]:
        """Return the event with the token counts, if the client wants it."""
        return [self._completion(head, [], usage)] if with_usage else []

    @staticmethod
    def _completion(head: Head, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> TextLogprobs:
        tokens: list[str] = []
        offsets: list[int] = []
        logprobs = [each for piece in pieces for each in piece.logprobs]
        for piece in pieces:
            for token in piece.tokens:
                tokens.append(self._text.token_text(token))
                offsets.append(offset)
                offset += len(tokens[-1])
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=[_ln(each.millinats) for each in logprobs],
            top_logprobs=[
                {
                    self._text.token_text(token): _ln(value)
                    for token, value in zip(each.top, each.top_millinats, strict=False)
                }
                for each in logprobs
            ],
            text_offset=offsets,
        )


def _said(choice: Choice, pieces: Sequence[Piece]) -> AssistantMessage:
    text, reasoning = (
        "".join(parts) for parts in ((each.text for each in pieces), (each.reasoning for each in pieces))
    )
    calls = [
        CalledFunction(id=call.id, function=CalledName(name=call.name, arguments=call.arguments))
        for call in choice.calls
    ]
    return AssistantMessage(
        content=text if text or not calls else None, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET
    )


def _reason(choice: Choice) -> Literal["stop", "length", "tool_calls"]:
    match choice.finish_reason:
        case "length":
            return "length"
        case "tool_calls":
            return "tool_calls"
        case _:
            return "stop"


def _ln(millinats: int) -> float:
    return -millinats / 1000


def _bytes(text: str) -> list[int] | None:
    """Return the token's bytes, or None if it holds only part of a character: its text does not tell them."""
    return None if "�" in text else list(text.encode())
