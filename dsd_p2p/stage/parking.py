"""Text that a stage still holds of closed sessions, so that the next turn of a conversation need not be computed from its start."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from dsd_p2p.errors import PrefixLost
from dsd_p2p.stage.span_model import SpanCache
from dsd_p2p.types import PeerId, Span
from dsd_p2p.wire.messages import Prefix

PARKED_S = 1800.0
"""How long a text is held at most."""


@dataclass(slots=True, kw_only=True, eq=False)
class Parked:
    """The text of one closed session. num_users: who copies from it right now; is_unwanted: free it after them.

    scope: of the task that holds it, which ends with it.
    """

    coordinator: PeerId
    session: bytes
    span: Span
    cache: SpanCache
    num_tokens: int
    num_users: int = 0
    is_unwanted: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @contextmanager
    def in_use(self) -> Iterator[SpanCache]:
        """Keep the cache alive until the end of the block."""
        self.num_users += 1
        try:
            yield self.cache
        finally:
            self.num_users -= 1
            self._free_if_done()

    def discard(self) -> None:
        """Free the cache as soon as nobody uses it."""
        self.is_unwanted = True
        self.scope.cancel()
        self._free_if_done()

    def _free_if_done(self) -> None:
        if self.is_unwanted and not self.num_users:
            self.cache.free()


class ParkedTexts:
    """All that is parked at a stage; it never keeps a session from its room. max_texts: in all."""

    def __init__(self, max_texts: int) -> None:
        self._max_texts = max_texts
        self._texts: OrderedDict[tuple[PeerId, bytes], Parked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_bytes(self) -> int:
        """Cache that they take."""
        return sum(parked.cache.num_bytes for parked in self._texts.values())

    def add(self, parked: Parked) -> None:
        """Hold one more text; another may go for it."""
        self.discard(parked.coordinator, parked.session)
        self._texts[parked.coordinator, parked.session] = parked
        if len(self._texts) > self._max_texts:
            self.evict()

    def find(self, coordinator: PeerId, prefix: Prefix, span: Span) -> Parked:
        """Return the parked text that a session is to go on from; its coordinator must have parked it.

        Raises:
            PrefixLost: it is not here, or no longer, or shorter, or of other layers.
        """
        parked = self._texts.get((coordinator, prefix.session))
        if parked is None or parked.span != span or parked.num_tokens < prefix.num_tokens:
            raise PrefixLost(f"{prefix.num_tokens} tokens of session {prefix.session.hex()} are not parked here")
        self._texts.move_to_end((coordinator, prefix.session))
        return parked

    def evict(self) -> bool:
        """Discard the text unused for longest, of the coordinator that has the most; False when there is none."""
        if not self._texts:
            return False
        ((greediest, _),) = Counter(coordinator for coordinator, _ in self._texts).most_common(1)
        session = next(session for coordinator, session in self._texts if coordinator == greediest)
        return self.discard(greediest, session)

    def discard(self, coordinator: PeerId, session: bytes) -> bool:
        """Discard one text; False when it is not here."""
        parked = self._texts.pop((coordinator, session), None)
        if parked is not None:
            parked.discard()
        return parked is not None

    def remove(self, parked: Parked) -> None:
        """Discard this very text, if it is still here: another may have come under its name."""
        if self._texts.get((parked.coordinator, parked.session)) is parked:
            self.discard(parked.coordinator, parked.session)

    def forget(self, coordinator: PeerId) -> None:
        """Discard all that a coordinator has parked."""
        for owner, session in [key for key in self._texts if key[0] == coordinator]:
            self.discard(owner, session)

    def clear(self) -> None:
        """Discard everything."""
        while self.evict():
            pass
