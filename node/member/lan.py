"""Finds members of our swarm on the local network with multicast DNS, even after their addresses changed.

The announcement names neither the swarm nor its key. Only a holder of the network key can tell which swarm it belongs
to. A found address is only a hint, like one in an invite: the peer that answers there must still know the key and show
its grants.
"""

import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

logger = logging.getLogger(__name__)

_SERVICE = "_dsd-p2p._tcp.local."
_ASK_TIMEOUT_MS = 2000
_MAX_TEXT_BYTES = 240


class _Listener(ServiceListener):
    """Filters the announcements for our swarm. zeroconf calls it in its own thread."""

    def __init__(self, tag: bytes, me: str, found: Callable[[str], None]) -> None:
        self._tag, self._me, self._found = tag, me, found

    def add_service(self, zeroconf: Any, kind: str, name: str) -> None:
        info = zeroconf.get_service_info(kind, name, timeout=_ASK_TIMEOUT_MS)
        properties = info.properties if info is not None else {}
        if properties.get(b"swarm") != self._tag:
            return
        for key, value in properties.items():
            address = (value or b"").decode("ascii", errors="replace")
            if key.startswith(b"address") and "/p2p/" in address and self._me not in address:
                self._found(address)

    def update_service(self, zeroconf: Any, kind: str, name: str) -> None:
        self.add_service(zeroconf, kind, name)

    def remove_service(self, zeroconf: Any, kind: str, name: str) -> None:
        pass


@asynccontextmanager
async def neighbours(
    *,
    network_key: bytes,
    peer: str,
    addresses: Sequence[str],
    found: Callable[[str], None],
    interfaces: InterfaceChoice | Sequence[str] = InterfaceChoice.All,
) -> AsyncIterator[None]:
    """Announce our addresses, and call `found` in this trio loop with those of other peers with the same network key.

    Where multicast does not work, log a warning and go on without it.
    """
    token = trio.lowlevel.current_trio_token()
    tag = hashlib.sha256(b"dsd-p2p mdns" + network_key).hexdigest()[:16].encode()
    listener = _Listener(tag, peer, lambda address: token.run_sync_soon(found, address))
    try:
        zeroconf = await trio.to_thread.run_sync(_start, tag, peer, addresses, listener, interfaces)
    except (OSError, ZeroconfError) as exc:
        logger.warning("multicast DNS unavailable, members are found only by known addresses error=%s", exc)
        yield
        return
    try:
        yield
    finally:
        # This gives up by itself after some seconds.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(zeroconf.close)


def _start(
    tag: bytes, peer: str, addresses: Sequence[str], listener: _Listener, interfaces: InterfaceChoice | Sequence[str]
) -> Zeroconf:
    zeroconf = Zeroconf(interfaces=interfaces)
    parts = addresses[0].split("/")
    properties: dict[bytes, bytes] = {b"swarm": tag}
    for index, address in enumerate(addresses):
        # A TXT entry holds at most 255 bytes, including its name.
        if len(address) < _MAX_TEXT_BYTES:
            properties[f"address{index}".encode()] = address.encode()
    info = ServiceInfo(
        _SERVICE,
        f"{peer[-32:]}.{_SERVICE}",
        addresses=[socket.inet_aton(parts[2])],
        port=int(parts[4]),
        properties=properties,
    )
    try:
        zeroconf.register_service(info, allow_name_change=True)
        ServiceBrowser(zeroconf, _SERVICE, listener)
    except BaseException:
        zeroconf.close()
        raise
    return zeroconf
