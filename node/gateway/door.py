"""Lets HTTP connections in: so many in all and from one address, each with a first request within seconds.

Hypercorn waits for the head of a request as long as its other end likes, and speaks HTTP/2 to whoever asks for it. Here
a connection reaches it only once its first head is complete. Later heads on it end with hypercorn's keep-alive time.
"""

import logging
from collections import Counter
from functools import partial
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.events import Event
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS, _MAX_OF_ADDRESS = 768, 256
_HEAD_S = 10.0
_MAX_HEAD_BYTES = 64 << 10
_REFUSAL_S = 1.0
_END = b"\r\n\r\n"


class Door:
    """The connections of one gateway."""

    def __init__(self) -> None:
        self._of_address: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        """The number of open connections."""
        return self._of_address.total()

    async def serve(self, app: ASGIApp, config: Config, listener: trio.SocketListener) -> None:
        """Serve until cancelled, which ends all connections."""
        context = WorkerContext(None)
        wrapped = wrap_app(cast("ASGIFramework", app), config.wsgi_max_body_size, "asgi")
        handle = partial(self._admit, partial(_Http1Server, wrapped, config, context, ConnectionState({})))
        await trio.serve_listeners(handle, [listener])

    async def _admit(self, serve: partial["_Http1Server"], stream: trio.SocketStream) -> None:
        address = ""
        try:
            address = str(stream.socket.getpeername()[0])
            is_full = self.num_open >= _MAX_CONNECTIONS or self._of_address[address] >= _MAX_OF_ADDRESS
            self._of_address[address] += 1
            if is_full:
                await self._refuse(stream, "503 Service Unavailable", "too many connections")
                return
            head = await _first_head(stream)
            if head is None:
                await self._refuse(stream, "408 Request Timeout", f"no complete head within {_HEAD_S:g} s")
            elif not _is_http1(head):
                await self._refuse(stream, "505 HTTP Version Not Supported", "this gateway speaks HTTP/1.1")
            else:
                await serve(_Replayed(stream, head))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            # The other end is gone, perhaps before we asked who it is.
            await trio.aclose_forcefully(stream)
        finally:
            if address:
                self._of_address[address] -= 1
                if not self._of_address[address]:
                    del self._of_address[address]

    async def _refuse(self, stream: trio.SocketStream, status: str, text: str) -> None:
        body = f'{{"error": {{"message": "{text}", "type": "invalid_request_error"}}}}'
        answer = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        with trio.move_on_after(_REFUSAL_S):
            await stream.send_all(f"{answer}connection: close\r\n\r\n{body}".encode())
        await trio.aclose_forcefully(stream)


class _Http1Server(TCPServer):
    """Hypercorn's server of one connection, without its change to HTTP/2 when a later request asks for it."""

    @property
    def protocol(self) -> ProtocolWrapper:
        return self._protocol

    @protocol.setter
    def protocol(self, made: ProtocolWrapper) -> None:
        self._protocol = _Http1Only(made)


class _Http1Only(ProtocolWrapper):
    def __init__(self, other: ProtocolWrapper) -> None:
        self.__dict__.update(vars(other))

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except (H2CProtocolRequiredError, H2ProtocolAssumedError):
            # The server ends the connection.
            raise ConnectionError("HTTP/2 is not spoken here") from None


class _Replayed:
    """A stream that gives what was read of it once more."""

    def __init__(self, stream: trio.SocketStream, data: bytes) -> None:
        self._stream = stream
        self._data = data
        self.socket = stream.socket
        self.send_all = stream.send_all
        self.send_eof = stream.send_eof
        self.aclose = stream.aclose

    async def receive_some(self, max_bytes: int) -> bytes:
        if self._data:
            data, self._data = self._data[:max_bytes], self._data[max_bytes:]
            return data
        return bytes(await self._stream.receive_some(max_bytes))


async def _first_head(stream: trio.SocketStream) -> bytes | None:
    """Return what arrives up to the end of the first head and perhaps more; None if it does not end in time."""
    data = b""
    with trio.move_on_after(_HEAD_S):
        while _END not in data:
            chunk = await stream.receive_some(_MAX_HEAD_BYTES)
            data += chunk
            if not chunk:
                raise trio.BrokenResourceError
            if len(data) > _MAX_HEAD_BYTES and _END not in data:
                return None
        return data
    return None


def _is_http1(head: bytes) -> bool:
    first, _, rest = head.partition(b"\r\n")
    fields = rest[: rest.find(_END)].lower()
    return first.rsplit(b" ", 1)[-1] in (b"HTTP/1.1", b"HTTP/1.0") and b"upgrade: h2c" not in fields
