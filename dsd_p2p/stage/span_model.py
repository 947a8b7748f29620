"""Defines the interface between a stage server and the layers that it serves."""

from collections.abc import Sequence
from typing import Protocol, Self

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.types import Span
from dsd_p2p.verification.grammar import Grammars


class SpanCache(Protocol):
    """The keys and values of one session at one stage."""

    @property
    def num_bytes(self) -> int:
        """The memory that it takes from the budget."""
        ...

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots."""
        ...

    def copy(self, other: Self, num_slots: int) -> None:
        """Copy the first slots of another session's cache for the same layers into this one, which must be empty.

        Raises:
            PrefixLost: the other cache holds fewer.
        """
        ...

    def shrink(self) -> None:
        """Give the unused memory back. Nothing can be added afterwards."""
        ...

    def free(self) -> None:
        """Give the memory back to the budget. A second call does nothing."""
        ...


class SpanModel(Protocol):
    """The layers of one span. `dsd_p2p.models.span` implements it, and so do fakes that compute nothing."""

    @property
    def grammars(self) -> Grammars | None:
        """What compiles constraints for the model's tokens; None if nothing does."""
        ...

    def narrow(self, span: Span) -> "SpanModel":
        """Return a model of part of the span that shares tensors and cache budget with this one.

        Raises:
            ConfigError: the part is not inside the span.
        """
        ...

    @property
    def is_head(self) -> bool:
        """True when the span starts with the embedding."""
        ...

    @property
    def is_tail(self) -> bool:
        """True when the span ends with the norm and the LM head."""
        ...

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one node's hidden state."""
        ...

    def new_cache(self, max_slots: int, mark: int = 0, /) -> SpanCache:
        """Return an empty cache for up to `max_slots` slots.

        mark: a length to which a copy of it will often be cut, such as the prompt's; 0 for none.

        Raises:
            CapacityError: the memory budget is full.
        """
        ...

    def run(self, passes: Sequence[SpanPass]) -> Sequence[SpanOutput]:
        """Run the layers over new nodes of several sessions, and return one output per pass, in order.

        Each cache occurs once. A pass with invalid input or output (wrong number of bytes, a token outside the
        vocabulary, values that are not finite) gets the error as its output; the others are not affected.
        """
        ...
