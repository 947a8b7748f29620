"""Keeps the conversations of answers for a while, so that requests can go on from them by their id."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from node.gateway.errors import ApiError
from node.gateway.schema import ChatMessage

KEPT_S = 3600.0
_MAX_KEPT, _MAX_BYTES = 1024, 64 << 20


class KeptConversations:
    """Conversations by the id of their last answer, for an hour; the oldest go when there are too many.

    clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()
        self._num_bytes = 0

    def keep(self, owner: str, response: str, messages: Sequence[ChatMessage]) -> None:
        """Keep a client's conversation."""
        data = msgspec.msgpack.encode(messages)
        self._kept[owner, response] = (self._clock() + KEPT_S, data)
        self._num_bytes += len(data)
        while self._kept and (
            len(self._kept) > _MAX_KEPT or self._num_bytes > _MAX_BYTES or self._oldest_s() <= self._clock()
        ):
            _, (_, dropped) = self._kept.popitem(last=False)
            self._num_bytes -= len(dropped)

    def _oldest_s(self) -> float:
        return next(iter(self._kept.values()))[0]

    def of(self, owner: str, response: str) -> list[ChatMessage]:
        """Return a client's conversation up to an answer.

        Raises:
            ApiError: 404, there is none of this id, or no more.
        """
        until_s, data = self._kept.get((owner, response), (0.0, b""))
        if until_s <= self._clock():
            message = f"response {response!r} is not kept here; responses are kept for an hour, unless store is false"
            raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
        return msgspec.msgpack.decode(data, type=list[ChatMessage])
