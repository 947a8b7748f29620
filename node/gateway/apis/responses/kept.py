"""Keeps the conversations of answers for a while, so that requests can go on from them by their id."""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence

import msgspec

from node.gateway.errors import ApiError
from node.gateway.schema import ChatMessage

KEPT_S = 3600.0
_MAX_KEPT, _MAX_BYTES = 256, 16 << 20


class KeptConversations:
    """Conversations by the id of their last answer, for an hour; the oldest of a client go when it has too many.

    clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, OrderedDict[str, tuple[float, bytes]]] = defaultdict(OrderedDict)

    def keep(self, owner: str, response: str, messages: Sequence[ChatMessage]) -> None:
        """Keep a client's conversation."""
        kept = self._kept[owner]
        kept[response] = (self._clock() + KEPT_S, msgspec.msgpack.encode(messages))
        num_bytes = sum(len(data) for _, data in kept.values())
        while kept and (len(kept) > _MAX_KEPT or num_bytes > _MAX_BYTES or self._is_past(next(iter(kept.values())))):
            _, (_, dropped) = kept.popitem(last=False)
            num_bytes -= len(dropped)

    def _is_past(self, entry: tuple[float, bytes]) -> bool:
        return entry[0] <= self._clock()

    def of(self, owner: str, response: str) -> list[ChatMessage]:
        """Return a client's conversation up to an answer.

        Raises:
            ApiError: 404, there is none of this id, or no more.
        """
        entry = self._kept[owner].get(response)
        if entry is None or self._is_past(entry):
            message = f"response {response!r} is not kept here; responses are kept for an hour, unless store is false"
            raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
        return msgspec.msgpack.decode(entry[1], type=list[ChatMessage])
