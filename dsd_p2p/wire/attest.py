"""Computes the hashes and the text that a stage signs for a window.

A row is a node's hidden state as sent on the link, or its token before the head. The tail's rows are `PROBES` of its
logits. Neighbours sign the same hash for the same row, so the signatures of a route cover every layer of every window.
They do not show that the layers were really computed; spot checks do.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import Span, TokenId
from dsd_p2p.wire.messages import ROW_HASH_BYTES, Window

_DOMAIN = b"dsd-p2p window 1\0"

PROBES = 128
"""Logits in one row of the tail's, of tokens that are spread evenly over the vocabulary."""

PROBE_BYTES = 4 * PROBES
NO_PROBES = bytes(PROBE_BYTES)
"""The tail's row for a node after which it picks nothing, behind the first `ALWAYS_PROBED` positions."""

ALWAYS_PROBED = 48
"""In an audited session the tail computes logits at the first positions too, where the prompt is: a short answer alone
has too few rows to tell weights of 8 bits from rounding."""


def probes_of(logits: NDArray[np.float32]) -> bytes:
    """Return the tail's row, float32 `[PROBES]`, for logits `[V]`."""
    chosen = np.linspace(0, len(logits) - 1, PROBES).astype(np.int64)
    return logits[chosen].astype("<f4").tobytes()


def hash_rows(data: bytes, row_bytes: int) -> bytes:
    """Return the concatenated hashes of the rows of hidden states."""
    return b"".join(_hash(data[start : start + row_bytes]) for start in range(0, len(data), row_bytes))


def hash_tokens(tokens: Sequence[TokenId]) -> bytes:
    """Return the concatenated hashes of the tokens, the rows before the head."""
    return b"".join(_hash(token.to_bytes(8, "little")) for token in tokens)


def row_hash(hashes: bytes, row: int) -> bytes:
    """Return one row's hash."""
    return hashes[row * ROW_HASH_BYTES : (row + 1) * ROW_HASH_BYTES]


def signed_text(window: Window, span: Span, inputs: bytes, outputs: bytes) -> bytes:
    """Return the bytes that a stage signs after it ran `span` over `window`."""
    numbers = (window.epoch, window.window, window.first_node, len(window.tokens), span.first, span.last)
    return b"".join((_DOMAIN, window.session, *(number.to_bytes(8, "little") for number in numbers), inputs, outputs))


def row_errors(claimed: NDArray[np.float32], computed: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the error of each row, float64 `[n]`, of arrays `[n, d]`. A row that is not finite has an infinite one."""
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.linalg.norm(computed.astype(np.float64), axis=1) + 1e-6
        errors = np.linalg.norm(claimed.astype(np.float64) - computed, axis=1) / scale
    return np.where(np.isfinite(errors), errors, np.inf)


def _hash(row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=ROW_HASH_BYTES).digest()
