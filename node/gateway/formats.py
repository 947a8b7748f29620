"""Writes answers in the formats of the two endpoints."""

from collections.abc import Sequence

from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId, TokenLogprobs
from node.gateway.choice import Choice, Piece
from node.gateway.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from node.gateway.writing import Head


class ChatFormat:
    """The format of `/v1/chat/completions`."""

    prefix = "chatcmpl"

    def __init__(self, text: TextCodec) -> None:
        self._text = text

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
                    message=AssistantMessage(content="".join(piece.text for piece in pieces)),
                    finish_reason="length" if choice.finish_reason == "length" else "stop",
                    logprobs=self._logprobs(choice, pieces),
                )
                for index, (choice, pieces) in enumerate(choices)
            ],
        )

    def first(self, head: Head, index: int) -> object:
        """Return the first event of an answer."""
        return self._chunk(head, [ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])

    def event(self, head: Head, index: int, piece: Piece) -> object:
        """Return the event with the next part of an answer."""
        content = [self._token(token, each) for token, each in zip(piece.tokens, piece.logprobs, strict=False)]
        logprobs = ChatLogprobs(content=content) if content else None
        return self._chunk(head, [ChunkChoice(index=index, delta=Delta(content=piece.text), logprobs=logprobs)])

    def last(self, head: Head, index: int, choice: Choice) -> object:
        """Return the last event of an answer."""
        return self._chunk(head, [ChunkChoice(index=index, delta=Delta(), finish_reason=choice.finish_reason)])

    def usage(self, head: Head, usage: Usage) -> object:
        """Return the event with the token counts."""
        return self._chunk(head, [], usage)

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


class TextFormat:
    """The format of `/v1/completions`.

    echoes: for each choice, the prompt if the client wants it repeated, otherwise empty.
    """

    prefix = "cmpl"

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

    def first(self, head: Head, index: int) -> object | None:
        """Return the event that repeats the prompt, if the client wants it."""
        echo = self._echoes[index]
        return self._completion(head, [TextChoice(index=index, text=echo, finish_reason=None)]) if echo else None

    def event(self, head: Head, index: int, piece: Piece) -> object:
        """Return the event with the next part of an answer."""
        logprobs = self._logprobs([piece], self._offsets[index]) if piece.logprobs else None
        self._offsets[index] += sum(len(self._text.token_text(token)) for token in piece.tokens)
        return self._completion(head, [TextChoice(index=index, text=piece.text, finish_reason=None, logprobs=logprobs)])

    def last(self, head: Head, index: int, choice: Choice) -> object:
        """Return the last event of an answer."""
        reason = "length" if choice.finish_reason == "length" else "stop"
        return self._completion(head, [TextChoice(index=index, text="", finish_reason=reason)])  # type: ignore[arg-type]

    def usage(self, head: Head, usage: Usage) -> object:
        """Return the event with the token counts."""
        return self._completion(head, [], usage)

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


def _ln(millinats: int) -> float:
    return -millinats / 1000


def _bytes(text: str) -> list[int] | None:
    """Return the token's bytes, or None if it holds only part of a character: its text does not tell them."""
    return None if "�" in text else list(text.encode())
