"""Turns tokens into text while they arrive. The pieces, joined, are what the tokenizer makes of all tokens at once.

How it works. A tokenizer decodes a token differently after other tokens: bytes form a character, a leading space is
dropped. So the last tokens are decoded together each time, and what is new is shown. Held back are characters that the
next token can complete, and tokens that stand for one byte: whether a run of these is text shows at its end. Old tokens
are dropped when the text of the rest does not depend on them.
"""

import re
from typing import Any

from dsd_p2p.types import TokenId

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MAX_KEPT, _CONTEXT, _CUTS = 64, 16, 8
"""When so many tokens are kept, all but the last few are dropped, at one of a few places."""


class TextStreamer:
    """A decoder that returns text as soon as the next tokens cannot change it.

    tokenizer: transformers' tokenizer, or None if the model has none; then there is no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._tokens: list[TokenId] = []
        self._shown = ""

    def step(self, token: TokenId) -> str:
        """Return the text that `token` completes: often a word, sometimes nothing."""
        if self._tokenizer is None:
            return ""
        if token in self._special:
            return ""
        self._tokens.append(token)
        if self._is_byte(token):
            return ""
        piece = self._show(self._decode(self._tokens).rstrip(_UNFINISHED))
        if len(self._tokens) >= _MAX_KEPT:
            self._drop_old()
        return piece

    def finish(self) -> str:
        """Return the text that was held back. Call it after the last token."""
        return self._show(self._decode(self._tokens)) if self._tokens else ""

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _drop_old(self) -> None:
        whole = self._decode(self._tokens)
        num_held = len(whole) - len(self._shown)
        for cut in range(len(self._tokens) - _CONTEXT, len(self._tokens) - _CONTEXT - _CUTS, -1):
            text = self._decode(self._tokens[cut:])
            is_independent = not self._is_byte(self._tokens[cut]) and not self._is_byte(self._tokens[cut - 1])
            if is_independent and whole.endswith(text) and len(text) > num_held:
                self._tokens = self._tokens[cut:]
                self._shown = text[: len(text) - num_held]
                return

    def _is_byte(self, token: TokenId) -> bool:
        return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None

    def _decode(self, tokens: list[TokenId]) -> str:
        return decode(self._tokenizer, tokens)


def special_tokens(tokenizer: Any) -> frozenset[TokenId]:
    """Return the tokens that have no text."""
    if tokenizer is None:
        return frozenset()
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def decode(tokenizer: Any, tokens: list[TokenId]) -> str:
    """Return the text of `tokens` without special ones. No space is removed that the tokenizer itself does not."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
