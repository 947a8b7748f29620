"""The outgoing link and the read buffer of a neighbour's streams."""

from contextlib import suppress
from typing import Any

import trio
from libp2p.host.exceptions import HostException
from libp2p.io.exceptions import IOException
from libp2p.network.exceptions import SwarmException

_READ_BYTES = 64 << 10
_QUEUE_FRAMES = 64

NETWORK_ERRORS = (IOException, SwarmException, HostException, OSError)


class Link:
    """The outgoing link to one neighbour. is_attempt: `connect` opened it and waits for its stream."""

    def __init__(self, *, is_attempt: bool) -> None:
        self.stream: Any = None
        self.is_attempt = is_attempt
        self.is_settled = trio.Event()
        self.is_over = trio.Event()
        self.queue, self.waiting = trio.open_memory_channel[bytes](_QUEUE_FRAMES)


class StreamBuffer:
    """A buffer that cuts a stream into pieces. It reads all that is available, because each read passes five layers."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def take(self, num_bytes: int) -> bytes:
        """Return the next `num_bytes` of the stream.

        Raises one of `NETWORK_ERRORS` if the stream ends first.
        """
        while len(self._buffer) < num_bytes:
            self._buffer += await self._stream.read(_READ_BYTES)
        piece = bytes(memoryview(self._buffer)[:num_bytes])
        del self._buffer[:num_bytes]
        return piece


async def reset(stream: Any) -> None:
    """End a stream at once; do nothing if it has ended already."""
    with trio.CancelScope(shield=True), trio.move_on_after(1), suppress(*NETWORK_ERRORS):
        await stream.reset()


def check_open(link: Link) -> None:
    """Check that a link's stream could be opened.

    Raises:
        SwarmException: the peer does not speak this protocol.
    """
    if link.stream is None:
        raise SwarmException("the peer does not speak this protocol")
