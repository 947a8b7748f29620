"""Compiles constraints for a model's tokens, with llguidance (github.com/guidance-ai/llguidance).

How it works. The library walks its grammar and a tree of all tokens at once, so a mask of the whole vocabulary costs a
tenth of a millisecond, and a question about one token a few microseconds. Its matcher never raises: it enters a state of
error, which is turned into our errors here. Stop tokens are ours: the matcher never sees them.
"""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.models.grammar_trial import why_not
from dsd_p2p.models.text import load_tokenizer
from dsd_p2p.types import Constraint, ConstraintKind, TokenId

_SPACE = r"\n? {0,16}"
"""The space between the parts of JSON. Without a bound, small models write line breaks until their tokens run out."""

_MAX_KEPT = 256
"""Constraints of which is remembered whether they can be used."""

_STEP_ITEMS, _STEP_FUEL = 20_000, 100_000


class ModelGrammars:
    """Compiles constraints for one model. folder: with the tokenizer. vocab_size: the number of logits."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._tried: OrderedDict[Constraint, _Tried] = OrderedDict()
        self._lock = threading.Lock()

    def grammar(self, constraint: Constraint, stop_tokens: Sequence[TokenId]) -> "ModelGrammar":
        """See `dsd_p2p.verification.grammar.Grammars`."""
        return ModelGrammar(self, constraint, stop_tokens)

    def matcher(self, constraint: Constraint) -> llguidance.LLMatcher:
        """Return a new matcher at the beginning of a text.

        Only what a trial found is kept: matchers that are copied share their lexer, and with it its limits.

        Raises:
            ConfigError: the constraint is wrong, or too large; or the model has no tokenizer that can be constrained.
        """
        with self._lock:
            tried = self._tried.get(constraint)
        tried = _try(constraint) if tried is None else tried
        with self._lock:
            self._tried[constraint] = tried
            self._tried.move_to_end(constraint)
            if len(self._tried) > _MAX_KEPT:
                self._tried.popitem(last=False)
            if tried.why_not:
                raise ConfigError(tried.why_not)
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._folder)
        matcher = llguidance.LLMatcher(self._tokenizer, tried.source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise ConfigError(f"the {constraint.kind} cannot be used: {_first_line(matcher.get_error())}")
        return matcher

    @property
    def end_tokens(self) -> frozenset[TokenId]:
        """The tokens that the library takes for ends of a text."""
        return frozenset() if self._tokenizer is None else frozenset(self._tokenizer.eos_tokens)

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self._vocab_size

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the tokenizer has; embeddings often have more rows."""
        return 0 if self._tokenizer is None else min(self._tokenizer.vocab_size, self._vocab_size)


class _Tried(NamedTuple):
    """What a trial found: the grammar in the library's form, or why it cannot be used."""

    source: str = ""
    why_not: str = ""


def _try(constraint: Constraint) -> _Tried:
    try:
        source = _grammar_of(constraint)
    except Exception as exc:  # the library's converters raise whatever occurs to them
        return _Tried(why_not=f"the {constraint.kind} cannot be read: {_first_line(str(exc))}")
    if (reason := why_not(source)) is not None:
        return _Tried(why_not=f"the {constraint.kind} cannot be used: {_first_line(reason)}")
    return _Tried(source=source)


def _limits() -> llguidance.LLParserLimits:
    """Return limits with which no mask takes much longer than a pass."""
    return llguidance.LLParserLimits(step_max_items=_STEP_ITEMS, step_lexer_fuel=_STEP_FUEL)


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
        return TokenMatcher(self._owner, self._constraint, self._stop_tokens)


class TokenMatcher:
    """A place within a constrained text (`dsd_p2p.verification.grammar.Matcher`)."""

    def __init__(self, owner: ModelGrammars, constraint: Constraint, stop_tokens: tuple[TokenId, ...]) -> None:
        self._owner, self._constraint, self._stop_tokens = owner, constraint, stop_tokens
        self._matcher = owner.matcher(constraint)
        # What the library takes for an end is one only if the request says so.
        self._never = owner.end_tokens - frozenset(stop_tokens)
        self._written: list[TokenId] = []
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
        if token >= self._owner.num_tokens or token in self._never or self._matcher.is_stopped():
            return False
        return bool(self._matcher.validate_tokens([token]))

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens the text can go on with, bool `[V]`.

        Raises:
            ConfigError: none, because the constraint is too complex from here on.
        """
        vocab_size = self._owner.vocab_size
        allowed = np.zeros(vocab_size, np.bool_)
        if not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            num_tokens = self._owner.num_tokens
            allowed[:num_tokens] = bits[:num_tokens]
        allowed[[token for token in self._never if token < vocab_size]] = False
        stops = [token for token in self._stop_tokens if token < vocab_size]
        allowed[stops] = self._matcher.is_accepting()
        if self._matcher.is_error() or not allowed.any():
            reason = _first_line(self._matcher.get_error()) or "no token goes on"
            raise ConfigError(f"the constraint is too complex from here on ({reason}): make it simpler")
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
            ConfigError: the constraint is too complex from here on.
            RemoteProtocolError: the constraint does not allow it.
        """
        if self.is_over:
            self._num_after += 1
            return
        is_allowed = self.allows(token)
        if is_allowed and token in self._stop_tokens:
            self._num_after = 1
        elif is_allowed and self._matcher.consume_token(token):
            self._written.append(token)
        elif self._matcher.is_error():
            raise ConfigError(f"the constraint is too complex from here on: {_first_line(self._matcher.get_error())}")
        else:
            raise RemoteProtocolError("token", "another one", "one that the constraint allows")

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens back, by reading the others again: not every grammar can go back."""
        num_after = min(num_tokens, self._num_after)
        self._num_after -= num_after
        if num_tokens > num_after:
            kept = self._written[: len(self._written) - (num_tokens - num_after)]
            self._matcher, self._written = self._owner.matcher(self._constraint), []
            for token in kept:
                self.advance(token)

    def copy(self) -> "TokenMatcher":
        """Return another matcher at the same place. The two share their lexer's limits."""
        other = copy.copy(self)
        other._matcher, other._written = self._matcher.deep_copy(), list(self._written)
        return other
