"""What a stage server asks of the layers it serves."""

from collections.abc import Sequence
from typing import Protocol, Self

from dsd_p2p.cache.passes import SpanOutput, SpanPass
from dsd_p2p.cache.slots import CacheEdit
from dsd_p2p.types import Span


class SpanCache(Protocol):
    """The keys and values of one session at one stage."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes of the budget."""
        ...

    def edit(self, edit: CacheEdit) -> None:
        """Keep and move slots."""
        ...

    def copy(self, other: Self, num_slots: int) -> None:
        """Begin with the first slots of another session's cache at the same layers; this one must be empty.

        Raises:
            PrefixLost: the other holds fewer.
        """
        ...

    def shrink(self) -> None:
        """Give back the room that is not in use: nothing more will be put in."""
        ...

    def free(self) -> None:
        """Give the memory back to the budget; twice is harmless."""
        ...


class SpanModel(Protocol):
    """The layers of one span, as a stage uses them (`dsd_p2p.models.span`, and fakes that compute nothing)."""

    def narrow(self, span: Span) -> "SpanModel":
        """Return part of the span as a model that shares everything with this one.

        Raises:
            ConfigError: the part is not inside.
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
        """Bytes of one node's hidden state."""
        ...

    def new_cache(self, max_slots: int) -> SpanCache:
        """Return an empty cache for up to `max_slots`.

        Raises:
            CapacityError: the memory budget is full.
        """
        ...

    def run(self, passes: Sequence[SpanPass]) -> Sequence[SpanOutput]:
        """Run the layers over new nodes of several sessions, each cache given once; in order, what comes of each.

        What is wrong with one of them (bytes, a token outside the vocabulary, values that are not finite) is its own output.
        """
        ...
