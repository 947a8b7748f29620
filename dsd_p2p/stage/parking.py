"""Parks the caches of closed sessions, so that the next turn of a conversation is not computed from its start.

`ParkedTexts` is the collection of parked texts. `Parking` creates the sessions' caches, copies parked text into them,
and parks them when their sessions end.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from dsd_p2p.errors import CapacityError, PrefixLost
from dsd_p2p.stage.session import StageSession
from dsd_p2p.stage.span_model import SpanCache
from dsd_p2p.types import PeerId, Span
from dsd_p2p.wire.messages import Prefix

logger = logging.getLogger(__name__)

PARKED_S = 1800.0
"""The longest time that a text stays parked."""


@dataclass(slots=True, kw_only=True, eq=False)
class Parked:
    """The parked text of one closed session.

    num_users: how many tasks use its cache right now. is_unwanted: free the cache when they are done.
    scope: cancels the task that holds the text.
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
        """Free the cache as soon as no task uses it."""
        self.is_unwanted = True
        self.scope.cancel()
        self._free_if_done()

    def _free_if_done(self) -> None:
        if self.is_unwanted and not self.num_users:
            self.cache.free()


class ParkedTexts:
    """The parked texts of a stage. They are evicted whenever a session needs their room.

    max_texts: the most texts to hold.
    """

    def __init__(self, max_texts: int) -> None:
        self._max_texts = max_texts
        self._texts: OrderedDict[tuple[PeerId, bytes], Parked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_bytes(self) -> int:
        """The cache that they take, in bytes."""
        return sum(parked.cache.num_bytes for parked in self._texts.values())

    def add(self, parked: Parked) -> None:
        """Add a text; evict another one if there are too many."""
        self.discard(parked.coordinator, parked.session)
        self._texts[parked.coordinator, parked.session] = parked
        if len(self._texts) > self._max_texts:
            self.evict()

    def find(self, coordinator: PeerId, prefix: Prefix, span: Span) -> Parked:
        """Return the parked text of `coordinator` that begins with `prefix`.

        Raises:
            PrefixLost: it is not parked here (any more), is shorter, or belongs to other layers.
        """
        parked = self._texts.get((coordinator, prefix.session))
        if parked is None or parked.span != span or parked.num_tokens < prefix.num_tokens:
            raise PrefixLost(f"{prefix.num_tokens} tokens of session {prefix.session.hex()} are not parked here")
        self._texts.move_to_end((coordinator, prefix.session))
        return parked

    def evict(self) -> bool:
        """Discard the least recently used text of the coordinator that has the most; return False if there is none."""
        if not self._texts:
            return False
        ((greediest, _),) = Counter(coordinator for coordinator, _ in self._texts).most_common(1)
        session = next(session for coordinator, session in self._texts if coordinator == greediest)
        return self.discard(greediest, session)

    def discard(self, coordinator: PeerId, session: bytes) -> bool:
        """Discard one text; return False if it is not here."""
        parked = self._texts.pop((coordinator, session), None)
        if parked is not None:
            parked.discard()
        return parked is not None

    def remove(self, parked: Parked) -> None:
        """Discard this text unless another one has replaced it under the same name."""
        if self._texts.get((parked.coordinator, parked.session)) is parked:
            self.discard(parked.coordinator, parked.session)

    def forget(self, coordinator: PeerId) -> None:
        """Discard all texts of a coordinator."""
        for owner, session in [key for key in self._texts if key[0] == coordinator]:
            self.discard(owner, session)

    def clear(self) -> None:
        """Discard everything."""
        while self.evict():
            pass


class Parking:
    """The manager of a stage's caches and parked texts.

    model_in_use: a lock, held while the model runs. max_parked, parked_s: see `StageLimits`.
    """

    def __init__(self, model_in_use: trio.Lock, max_parked: int, parked_s: float) -> None:
        self._model_in_use = model_in_use
        # Copies queue here before they wait for the model, so that a pass can run between two copies.
        self._in_use = trio.Lock()
        self._parked_s = parked_s
        self._nursery: trio.Nursery | None = None
        self.texts = ParkedTexts(max_parked)

    def start(self, nursery: trio.Nursery) -> None:
        """Hold texts until the nursery closes."""
        self._nursery = nursery

    async def new_cache(self, session: StageSession, max_slots: int) -> SpanCache:
        """Return an empty cache for the session; evict parked texts if it needs their room.

        Raises:
            CapacityError: open sessions fill the memory budget.
        """
        model = session.place.model
        # The same prompt asked again begins with all of it but its last token.
        mark = session.opened.num_prompt - 1
        with suppress(CapacityError):
            return model.new_cache(max_slots, mark)
        # With both locks held nobody copies a parked text, so an evicted one is freed at once.
        async with self._in_use, self._model_in_use:
            while True:
                try:
                    return model.new_cache(max_slots, mark)
                except CapacityError:
                    if not self.texts.evict():
                        raise

    async def copy_prefix(self, session: StageSession, cache: SpanCache) -> None:
        """Copy the session's prefix, if it has one, from the parked text into the session's cache.

        Raises:
            PrefixLost: the text is not parked here any more.
        """
        if (prefix := session.opened.prefix) is None:
            return
        async with self._in_use, self._model_in_use:
            parked = self.texts.find(session.coordinator, prefix, session.place.span)
            with parked.in_use() as held:
                await trio.to_thread.run_sync(cache.copy, held, prefix.num_tokens)

    def park(self, session: StageSession) -> bool:
        """Park the text of a session that ended without error, if its coordinator asked for it.

        Return False if it was not parked; the caller then frees its cache.
        """
        park, held, opened = session.park, session.held, session.opened
        if park is None or session.error is not None or held.cache is None or self._nursery is None:
            return False
        try:
            held.log = None
            held.resume(epoch=opened.epoch, at=park.at, num_kept=park.num_tokens)
        except Exception as exc:  # task boundary: an invalid `park` must not keep the session from ending
            logger.warning("text not parked session=%s error=%s", opened.session.hex(), exc)
            return False
        parked = Parked(
            coordinator=session.coordinator,
            session=opened.session,
            span=session.place.span,
            cache=held.cache,
            num_tokens=park.num_tokens,
        )
        self.texts.add(parked)
        self._nursery.start_soon(self._hold, parked)
        return True

    async def _hold(self, parked: Parked) -> None:
        with parked.scope:
            try:
                async with self._in_use, self._model_in_use:
                    with parked.in_use() as cache:
                        await trio.to_thread.run_sync(cache.shrink)
                await trio.sleep(self._parked_s)
            except Exception:  # task boundary: a text that cannot be parked must not stop the stage
                logger.exception("parked text lost session=%s", parked.session.hex())
            finally:
                self.texts.remove(parked)
