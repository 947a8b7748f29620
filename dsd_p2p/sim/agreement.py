"""Reads and writes agreement: a target's recorded texts, with a drafter's candidates at every position.

The files are small enough to ship with the project; `dsd sim record` makes them again.
"""

import gzip
import zlib
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import TokenId


class RecordedText(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the target, with the drafter's candidates.

    category: chat, maths or code. source: the prompt's name in its collection.
    tokens: the target's greedy text, length n.
    draft_tokens, draft_centinats: for each of the n positions, the drafter's likeliest candidates given the text before
        it, and -100 times the natural logarithms of their probabilities.
    """

    category: str
    source: str
    tokens: tuple[TokenId, ...]
    draft_tokens: tuple[tuple[TokenId, ...], ...]
    draft_centinats: tuple[tuple[int, ...], ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded texts of one pair of models, and how they were made."""

    target: str
    drafter: str
    dtype: str
    command: str
    date: str
    vocab_size: int
    texts: tuple[RecordedText, ...]


def write_agreement(trace: Agreement, path: Path) -> None:
    """Write the agreement as gzipped JSON. The same agreement always gives the same bytes."""
    path.write_bytes(gzip.compress(msgspec.json.encode(trace), mtime=0))


def read_agreement(path: Path) -> Agreement:
    """Return the agreement in `path`.

    Raises:
        ConfigError: the file cannot be read or is not an agreement.
    """
    try:
        trace = msgspec.json.decode(gzip.decompress(path.read_bytes()), type=Agreement)
    except (OSError, EOFError, zlib.error, msgspec.DecodeError) as exc:
        raise ConfigError(f"agreement file {path}: {exc}; make one with `dsd sim record`") from exc
    for text in trace.texts:
        if not len(text.tokens) == len(text.draft_tokens) == len(text.draft_centinats):
            wrong = "has lists of different lengths"
        elif any(map(_differ_in_length, text.draft_tokens, text.draft_centinats)):
            wrong = "does not have one probability per candidate"
        else:
            continue
        raise ConfigError(f"agreement file {path}: text {text.source} {wrong}; make it again with `dsd sim record`")
    return trace


def _differ_in_length(tokens: tuple[TokenId, ...], centinats: tuple[int, ...]) -> bool:
    return len(tokens) != len(centinats)
