"""Serves the gateway over HTTP until cancelled."""

import errno
from typing import Protocol

import hypercorn.trio
import trio
from hypercorn.config import Config

from dsd_p2p.errors import ConfigError
from node.gateway.app import Gateway


class TaskStatus(Protocol):
    """What `trio.Nursery.start` hands in."""

    def started(self, value: str) -> None:
        """Tell who waits for the start."""
        ...


_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_KEEP_ALIVE_S = 75.0


def check_exposure(host: str, *, needs_keys: bool) -> None:
    """Others may only ask with keys.

    Raises:
        ConfigError: the gateway would be open to the network.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and not needs_keys:
        raise ConfigError(f"--host {host} lets the network ask: give --api-keys FILE, or leave it at 127.0.0.1")


async def serve_gateway(
    gateway: Gateway,
    host: str,
    port: int,
    names: tuple[str, ...] = (),
    task_status: TaskStatus = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve; started with the base URL. names: further names or addresses that clients call it by.

    Raises:
        ConfigError: the port cannot be used.
    """
    config = Config()
    config.bind = [f"{host}:{port}"]
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = _KEEP_ALIVE_S
    config.graceful_timeout = 1.0
    config.shutdown_timeout = 1.0
    config.include_server_header = False
    hosts = ["*"] if gateway.clients.need_keys and not names and host == "0.0.0.0" else [*_LOCAL_NAMES, host, *names]  # noqa: S104
    app = gateway.app(hosts)
    try:
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(hypercorn.trio.serve, app, config)
            task_status.started(address.replace("0.0.0.0", "127.0.0.1"))  # noqa: S104
    except* OSError as group:
        first = group.exceptions[0]
        reason = "is in use" if getattr(first, "errno", 0) == errno.EADDRINUSE else str(first)
        raise ConfigError(f"port {port} of {host} {reason}: choose another with --port") from group
