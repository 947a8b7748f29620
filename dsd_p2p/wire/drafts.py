"""Defines the messages with which a peer drafts for a coordinator nearby (docs/protocol.md, "Drafts from a peer")."""

from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.types import MAX_POSITIONS, ModelKey, Position, Sampling, Token

MAX_STEMS = 64
MAX_GUESSES = 4096
MAX_LEVELS = 8

DraftBytes = Annotated[bytes, Meta(min_length=8, max_length=8)]
QuestionNumber = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Path = Annotated[tuple[Token, ...], Meta(max_length=1024)]


class OpenDrafts(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Coordinator → drafting peer: draft for a request of mine under the name `draft`.

    max_length: the greatest length of the text in tokens. sampling: how the target picks.
    """

    draft: DraftBytes
    model: ModelKey
    max_length: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    sampling: Sampling


class AskDraft(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """Coordinator → drafting peer: guess what follows. At most one question is under way.

    start, tokens: the text from position `start` on; the peer has what comes before from earlier questions.
    stems: for each node whose children are wanted, the tokens from the text's end to it. width: children of each.
    levels: how many levels to grow below the stems, the likeliest nodes first.
    """

    draft: DraftBytes
    number: QuestionNumber
    start: Position
    tokens: Annotated[tuple[Token, ...], Meta(max_length=MAX_POSITIONS)]
    stems: Annotated[tuple[Path, ...], Meta(min_length=1, max_length=MAX_STEMS)]
    width: Annotated[int, Meta(ge=1, le=64)]
    levels: Annotated[int, Meta(ge=1, le=MAX_LEVELS)] = 1


class Drafted(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """Drafting peer → coordinator: the guesses, those of one node next to each other and likeliest first.

    parents: of each guess: -1 - s below stem s, else the index of an earlier guess.
    centinats: -100 times the natural logarithm of each guess's probability.
    error: why there are none, or empty; the draft is over then.
    """

    draft: DraftBytes
    number: QuestionNumber
    parents: Annotated[
        tuple[Annotated[int, Meta(ge=-MAX_STEMS, lt=MAX_GUESSES)], ...], Meta(max_length=MAX_GUESSES)
    ] = ()
    tokens: Annotated[tuple[Token, ...], Meta(max_length=MAX_GUESSES)] = ()
    centinats: Annotated[tuple[Annotated[int, Meta(ge=0, le=100_000)], ...], Meta(max_length=MAX_GUESSES)] = ()
    error: Annotated[str, Meta(max_length=512)] = ""


class EndDrafts(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """Coordinator → drafting peer: the request is over, or drafts elsewhere; free its cache."""

    draft: DraftBytes
