"""The interface between verifiers and compiled constraints; `dsd_p2p.models.grammar` implements it."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import Constraint, TokenId


class Matcher(Protocol):
    """A place within a constrained text. A stop token ends the text; after that nothing is constrained."""

    @property
    def is_over(self) -> bool:
        """True once a stop token has ended the text."""
        ...

    def allows(self, token: TokenId) -> bool:
        """Return whether the text can go on with `token`. Much cheaper than `allowed`."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens the text can go on with, bool `[V]`.

        Raises:
            ConfigError: none, because the constraint is too complex from here on.
        """
        ...

    def forced(self) -> Sequence[TokenId]:
        """Return the tokens that spell what must come next; empty if there is a choice."""
        ...

    def advance(self, token: TokenId) -> None:
        """Go on with `token`.

        Raises:
            RemoteProtocolError: the constraint does not allow it.
        """
        ...

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        ...

    def copy(self) -> Self:
        """Return another matcher at the same place."""
        ...


class Grammar(Protocol):
    """A constraint. It is compiled when it is first needed."""

    def start(self) -> Matcher:
        """Return a matcher at the beginning of a text.

        Raises:
            ConfigError: the constraint is wrong, or too large.
        """
        ...


class Grammars(Protocol):
    """Compiles constraints for a model's tokens."""

    def grammar(self, constraint: Constraint, stop_tokens: Sequence[TokenId]) -> Grammar:
        """Return the constraint, to be compiled when it is first needed. stop_tokens: those that end a text."""
        ...
