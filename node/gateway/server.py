"""Serves the gateway over HTTP until it is cancelled."""

import errno
import socket
from typing import Protocol

import trio
from hypercorn.config import Config

from dsd_p2p.errors import ConfigError
from node.descriptors import raise_descriptors
from node.gateway.app import Gateway
from node.gateway.door import Door


class TaskStatus(Protocol):
    """The argument that `trio.Nursery.start` passes in."""

    def started(self, value: str) -> None:
        """Report the base URL once the server has started."""
        ...


_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_KEEP_ALIVE_S = 75.0
_UNREAD_MS = 30_000
_BACKLOG = 256


def check_exposure(host: str, *, needs_keys: bool) -> None:
    """Check that a gateway which other machines can reach needs keys.

    Raises:
        ConfigError: it would be open to the network.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and not needs_keys:
        raise ConfigError(f"--host {host} opens the gateway to the network: give --api-keys FILE, or use 127.0.0.1")


async def serve_gateway(
    gateway: Gateway,
    host: str,
    port: int,
    names: tuple[str, ...] = (),
    task_status: TaskStatus = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the gateway, and report the base URL once it has started.

    names: further names or addresses that clients may call it by.

    Raises:
        ConfigError: the port cannot be used.
    """
    listener = _listen(host, port)
    config = Config()
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = _KEEP_ALIVE_S
    config.include_server_header = False
    bound_host, bound_port = listener.getsockname()[:2]
    is_everywhere = bound_host in ("0.0.0.0", "::")  # noqa: S104 - only compared
    # Bound to every address, it accepts any host name, unless names are given: a request needs a key anyway.
    hosts = ["*"] if is_everywhere and not names else [*_LOCAL_NAMES, host, bound_host, *names]
    shown = "127.0.0.1" if is_everywhere else f"[{bound_host}]" if ":" in bound_host else bound_host
    raise_descriptors()
    listener.listen(_BACKLOG)
    task_status.started(f"http://{shown}:{bound_port}")
    await Door().serve(gateway.app(hosts), config, trio.SocketListener(trio.socket.from_stdlib_socket(listener)))


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port. The system ends a connection whose other end reads nothing for half a minute.

    Hypercorn sends without a deadline and shields the send: one stalled reader could otherwise keep us from stopping.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        listener.bind(address)
    except OSError as exc:
        reason = "is in use" if exc.errno == errno.EADDRINUSE else str(exc)
        raise ConfigError(f"port {port} of {host} {reason}: choose another with --port") from exc
    listener.setblocking(False)
    return listener
