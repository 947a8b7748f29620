"""Recorded agreement: what a target wrote and what a drafter proposed at every position of it.

Small enough to travel with the project; `dsd sim record` makes it again.
"""

import gzip
import zlib
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import TokenId


class RecordedText(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the target.

    category: chat, maths or code. source: the prompt's name in its collection.
    tokens: the target's greedy text, length n.
    draft_tokens, draft_centinats: for each of the n positions the drafter's likeliest candidates given the text before it,
        and -100 times the natural logarithm of their probabilities.
    """

    category: str
    source: str
    tokens: tuple[TokenId, ...]
    draft_tokens: tuple[tuple[TokenId, ...], ...]
    draft_centinats: tuple[tuple[int, ...], ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Texts of one pair of models, with where they come from."""

    target: str
    drafter: str
    dtype: str
    command: str
    date: str
    vocab_size: int
    texts: tuple[RecordedText, ...]


def write_agreement(trace: Agreement, path: Path) -> None:
    """Write gzipped JSON, the same bytes for the same trace."""
    path.write_bytes(gzip.compress(msgspec.json.encode(trace), mtime=0))


def read_agreement(path: Path) -> Agreement:
    """Return the trace in `path`.

    Raises:
        ConfigError: it cannot be read or is none.
    """
    try:
        trace = msgspec.json.decode(gzip.decompress(path.read_bytes()), type=Agreement)
    except (OSError, EOFError, zlib.error, msgspec.DecodeError) as exc:
        raise ConfigError(f"agreement trace {path}: {exc}; make one with `dsd sim record`") from exc
    for text in trace.texts:
        if not len(text.tokens) == len(text.draft_tokens) == len(text.draft_centinats):
            raise ConfigError(f"agreement trace {path}: text {text.source} has lists of different lengths")
        if any(map(_differ_in_length, text.draft_tokens, text.draft_centinats)):
            raise ConfigError(f"agreement trace {path}: text {text.source} has candidates without probabilities")
    return trace


def _differ_in_length(tokens: tuple[TokenId, ...], centinats: tuple[int, ...]) -> bool:
    return len(tokens) != len(centinats)
