"""Compiles constraints for a model's tokens, with llguidance (github.com/guidance-ai/llguidance).

How it works. The library walks its grammar and a tree of all tokens at once, so a mask of the whole vocabulary costs a
tenth of a millisecond, and a question about one token a few microseconds. Its matcher never raises: it enters a state of
error, which is turned into our errors here. Stop tokens are ours: the matcher never sees them.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from dsd_p2p.errors import ConfigError, ModelError, RemoteProtocolError
from dsd_p2p.models.grammar_trial import why_not
from dsd_p2p.models.text import load_tokenizer
from dsd_p2p.types import Constraint, ConstraintKind, TokenId

_SPACE = r"\n? {0,16}"
"""The space between the parts of JSON. Without a bound, small models write line breaks until their tokens run out."""

_MAX_KEPT = 64
"""Compiled constraints that are kept for later requests."""


class ModelGrammars:
    """Compiles constraints for one model. folder: with the tokenizer. vocab_size: the number of logits."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def grammar(self, constraint: Constraint, stop_tokens: Sequence[TokenId]) -> "ModelGrammar":
        """See `dsd_p2p.verification.grammar.Grammars`."""
        return ModelGrammar(self, constraint, stop_tokens)

    def compiled(self, constraint: Constraint) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of a text, from the kept ones if it is there.

        Raises:
            ConfigError: the constraint is wrong, or too large; or the model has no tokenizer that can be constrained.
        """
        with self._lock:
            matcher = self._compiled.get(constraint)
        # Others need not wait while one is compiled.
        matcher = self._compile(constraint) if matcher is None else matcher
        with self._lock:
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self._vocab_size

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the tokenizer has; embeddings often have more rows."""
        return 0 if self._tokenizer is None else min(self._tokenizer.vocab_size, self._vocab_size)

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        try:
            source = _grammar_of(constraint)
        except Exception as exc:  # the library's converters raise whatever occurs to them
            raise ConfigError(f"the {constraint.kind} cannot be read: {_first_line(str(exc))}") from exc
        if (reason := why_not(source)) is not None:
            raise ConfigError(f"the {constraint.kind} cannot be used: {_first_line(reason)}")
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._folder)
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the {constraint.kind} cannot be used: {_first_line(matcher.get_error())}")
        return matcher


def _tokenizer(folder: Path) -> llguidance.LLTokenizer:
    tokenizer, why_not = load_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"this model's answers cannot be constrained: it has no fast tokenizer{why_not}")
    return from_tokenizer(tokenizer)


def _grammar_of(constraint: Constraint) -> str:
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            schema = json.loads(source)
            return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _SPACE})
        case ConstraintKind.REGEX:
            return llguidance.LLMatcher.grammar_from_regex(source)
        case ConstraintKind.GRAMMAR:
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(source))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


class ModelGrammar:
    """A constraint of one request."""

    def __init__(self, owner: ModelGrammars, constraint: Constraint, stop_tokens: Sequence[TokenId]) -> None:
        self._owner = owner
        self._constraint = constraint
        self._stop_tokens = tuple(stop_tokens)

    def start(self) -> "TokenMatcher":
        """See `dsd_p2p.verification.grammar.Grammar`.

        Raises:
            ConfigError: the constraint is wrong, or too large; or no stop token could end the text.
        """
        if not self._stop_tokens:
            raise ConfigError("a constrained answer needs a stop token: the model's files name none")
        return TokenMatcher(self._owner.compiled(self._constraint), self._owner, self._stop_tokens)


class TokenMatcher:
    """A place within a constrained text (`dsd_p2p.verification.grammar.Matcher`)."""

    def __init__(self, matcher: llguidance.LLMatcher, owner: ModelGrammars, stop_tokens: tuple[TokenId, ...]) -> None:
        self._matcher = matcher
        self._owner = owner
        self._stop_tokens = stop_tokens
        self._num_after = 0

    @property
    def is_over(self) -> bool:
        """True once a stop token has ended the text."""
        return self._num_after > 0

    def allows(self, token: TokenId) -> bool:
        """Return whether the text can go on with `token`."""
        if self.is_over:
            return True
        if token in self._stop_tokens:
            return self._matcher.is_accepting()
        # The matcher takes a token that its tokenizer lacks as an error, and stays in it.
        if token >= self._owner.num_tokens or self._matcher.is_stopped():
            return False
        return bool(self._matcher.validate_tokens([token]))

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens the text can go on with, bool `[V]`.

        Raises:
            ModelError: none, because the constraint is too complex from here on.
        """
        vocab_size = self._owner.vocab_size
        allowed = np.zeros(vocab_size, np.bool_)
        if not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            num_tokens = self._owner.num_tokens
            allowed[:num_tokens] = bits[:num_tokens]
        stops = [token for token in self._stop_tokens if token < vocab_size]
        allowed[stops] = self._matcher.is_accepting()
        if self._matcher.is_error() or not allowed.any():
            reason = _first_line(self._matcher.get_error()) or "no token goes on"
            raise ModelError(f"the constraint is too complex from here on ({reason}): make it simpler")
        return allowed

    def forced(self) -> list[TokenId]:
        """Return the tokens that spell what must come next; empty if there is a choice."""
        if self.is_over:
            return []
        if self._matcher.is_stopped():
            return [self._stop_tokens[0]]
        return list(self._matcher.compute_ff_tokens())

    def advance(self, token: TokenId) -> None:
        """Go on with `token`.

        Raises:
            RemoteProtocolError: the constraint does not allow it.
        """
        if self.is_over:
            self._num_after += 1
            return
        if not self.allows(token):
            raise RemoteProtocolError("token", token, "one that the constraint allows")
        if token in self._stop_tokens:
            self._num_after = 1
        elif not self._matcher.consume_token(token):
            raise RemoteProtocolError("token", token, "one that the constraint allows")

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        num_after = min(num_tokens, self._num_after)
        self._num_after -= num_after
        if num_tokens > num_after:
            self._matcher.rollback(num_tokens - num_after)

    def copy(self) -> "TokenMatcher":
        """Return another matcher at the same place."""
        other = TokenMatcher(self._matcher.deep_copy(), self._owner, self._stop_tokens)
        other._num_after = self._num_after
        return other
