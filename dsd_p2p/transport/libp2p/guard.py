"""Guards a listening socket against strangers.

A private network, a deadline and a byte budget apply before authentication, and a gate on protocols after it. They are
needed because py-libp2p 0.8.1 lets an unauthenticated peer announce messages of any length, waits ten seconds for each
half-made connection, refuses all connections after its first 250, and opens any protocol without asking
(docs/adr/0002-libp2p.md).
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import libp2p.network.swarm
import trio
from Crypto.Cipher import Salsa20
from libp2p.connection_types import ConnectionType
from libp2p.io.utils import read_exactly
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.security.pnet.psk_conn import PskConn
from libp2p.transport.exceptions import SecurityUpgradeFailure

from dsd_p2p.types import PeerId

logger = logging.getLogger(__name__)

WRONG_NETWORK_KEY = "not in this private network: its network key is another or missing"

_MULTISTREAM = b"\x13/multistream/1.0.0\n"
_IDENTIFY = "/ipfs/id/1.0.0"
_MAX_BYTES_BEFORE_AUTHENTICATION = 64 << 10
_MAX_PENDING = 128
_MAX_PENDING_OF_ADDRESS = 32
_MAX_CONNECTIONS_OF_ADDRESS = 256
_CONNECTIONS_PER_S, _BURST_CONNECTIONS = 5.0, 100
"""Per address. A handshake takes ten milliseconds of a core, a refusal a hundredth of that; members stay connected."""

_MAX_ADDRESSES = 4096
_ADMISSION_S = 10.0
_CHECK_ADMISSION_S = 0.25


def install_private_network() -> None:
    """Use `_PrivateConnection` in networks with a key; relayed connections run inside encrypted ones and need none."""

    def protect(connection: Any, network_key: str) -> Any:
        if isinstance(connection, PskConn) or connection.get_connection_type() is ConnectionType.RELAYED:
            return connection
        return _PrivateConnection(connection, network_key)

    libp2p.network.swarm.new_protected_conn = protect


class _PrivateConnection(PskConn):
    """A private network's connection that detects a different key from the first bytes instead of by a timeout."""

    def __init__(self, connection: Any, network_key: str) -> None:
        super().__init__(connection, network_key)
        # Upstream does not set these, so asking for the connection's type or addresses would fail.
        RawConnection.__init__(self, connection.stream, connection.is_initiator)
        self.read_cipher: Any = None
        self._start = b""

    async def read(self, n: int | None = None) -> bytes:
        """Return bytes that the peer sent.

        Raises:
            RawConnError: the peer is not in this network.
        """
        if self.read_cipher is None:
            self.read_cipher = Salsa20.new(key=self._psk, nonce=await read_exactly(self._conn, 8))
        data: bytes = self.read_cipher.decrypt(await self._conn.read(n))
        if len(self._start) < len(_MULTISTREAM):
            self._start += data[: len(_MULTISTREAM) - len(self._start)]
            if not _MULTISTREAM.startswith(self._start):
                raise RawConnError(WRONG_NETWORK_KEY)
        return data


def limit_upgrade(network: Any, timeout_s: float) -> None:
    """Give authentication a deadline in both directions.

    libp2p's own deadline covers only the muxer, and a cancelled dial leaks a slot.
    """
    upgrade = network.upgrader.upgrade_security

    async def upgrade_in_time(connection: Any, is_initiator: bool, peer: Any = None) -> Any:
        try:
            with trio.fail_after(timeout_s):
                return await upgrade(connection, is_initiator, peer)
        except trio.TooSlowError:
            raise SecurityUpgradeFailure(f"no answer within {timeout_s:g} s") from None

    network.upgrader.upgrade_security = upgrade_in_time


class _GatedMultiselect(Multiselect):
    """A negotiator that offers strangers only identify and our own protocol, and admitted peers everything."""

    def __init__(self, handlers: Any, protocol: str, is_admitted: Callable[[PeerId], bool]) -> None:
        super().__init__(handlers)
        # Shares the live mapping, because handlers are added later.
        self.handlers = handlers
        self._public = frozenset((_IDENTIFY, protocol))
        self._is_admitted = is_admitted

    async def negotiate(self, communicator: Any, negotiate_timeout: int = 10) -> Any:
        """Return the protocol that the peer chose and its handler."""
        if self._is_admitted(PeerId(str(communicator.read_writer.muxed_conn.peer_id))):
            return await super().negotiate(communicator, negotiate_timeout)
        visible = {name: handler for name, handler in self.handlers.items() if name in self._public}
        return await Multiselect(visible).negotiate(communicator, negotiate_timeout)


def install_gate(host: Any, protocol: str, is_admitted: Callable[[PeerId], bool]) -> None:
    """Allow strangers no protocols except identify and `protocol`."""
    host.multiselect = _GatedMultiselect(host.multiselect.handlers, protocol, is_admitted)


class _BudgetedConnection(RawConnection):
    """A connection with a limit on the bytes read before authentication; setting `budget` to None lifts it."""

    budget: int | None = _MAX_BYTES_BEFORE_AUTHENTICATION

    async def read(self, n: int | None = None) -> bytes:
        """Return bytes that the peer sent.

        Raises:
            RawConnError: the peer sent more than a stranger may.
        """
        if self.budget is None:
            return await super().read(n)
        if self.budget <= 0:
            raise RawConnError("too many bytes before authentication")
        data: bytes = await super().read(min(n or self.budget, self.budget))
        # The limit may have been lifted while this read waited.
        if self.budget is not None:
            self.budget -= len(data)
        return data


class Pace:
    """A token bucket: `per_s` tokens a second, with bursts of up to `burst`."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst_s = burst / per_s
        self._due_s = 0.0

    def delay_s(self, now_s: float) -> float:
        """Take one token and return the seconds to wait for it, 0 or less within the pace."""
        self._due_s = max(self._due_s, now_s - self._burst_s) + 1 / self._per_s
        return self._due_s - now_s

    def charge(self, seconds: float, now_s: float) -> None:
        """Make no token free for the next `seconds`."""
        self._due_s = max(self._due_s, now_s + seconds)

    def is_free(self, now_s: float) -> bool:
        """Take one token if it is free now; return whether it was."""
        if max(self._due_s, now_s - self._burst_s) + 1 / self._per_s > now_s:
            return False
        self.delay_s(now_s)
        return True


class Doorman:
    """Accepts connections in place of libp2p's `Swarm._handle_inbound_connection`.

    It limits half-made connections and closes those of peers that are not admitted in time.
    """

    def __init__(self, network: Any, is_admitted: Callable[[PeerId], bool]) -> None:
        self._network = network
        self._is_admitted = is_admitted
        self._pending: dict[Any, str] = {}
        self._of_address: Counter[str] = Counter()
        self._paces: dict[str, Pace] = {}
        self.num_refused = 0
        network._handle_inbound_connection = self.accept

    async def accept(self, stream: Any, address: Any) -> None:
        """Serve one TCP connection, which is closed on return."""
        ip = (stream.get_remote_address() or ("?", 0))[0]
        num_pending = sum(pending == ip for pending in self._pending.values())
        is_crowded = num_pending >= _MAX_PENDING_OF_ADDRESS or self._of_address[ip] >= _MAX_CONNECTIONS_OF_ADDRESS
        if is_crowded or not self._pace_of(ip).is_free(trio.current_time()):
            self.num_refused += 1
            return
        self._of_address[ip] += 1
        self._pending[stream] = ip
        try:
            if len(self._pending) > _MAX_PENDING:
                await self._close_oldest()
            connection = await self._upgrade(stream, address)
            if connection is not None and await self._is_let_in(connection):
                await connection.event_closed.wait()
        finally:
            self._of_address[ip] -= 1
            if not self._of_address[ip]:
                del self._of_address[ip]

    def _pace_of(self, ip: str) -> Pace:
        while len(self._paces) > _MAX_ADDRESSES:
            del self._paces[next(iter(self._paces))]
        return self._paces.setdefault(ip, Pace(_CONNECTIONS_PER_S, _BURST_CONNECTIONS))

    async def _close_oldest(self) -> None:
        self.num_refused += 1
        oldest = next(iter(self._pending))
        del self._pending[oldest]
        # Close, not cancel: a cancelled upgrade never gives its slot back.
        await oldest.close()

    async def _upgrade(self, stream: Any, address: Any) -> Any:
        raw = _BudgetedConnection(stream, False)
        try:
            connection = await self._network.upgrade_inbound_raw_conn(raw, address)
        except Exception as exc:  # whatever a stranger's bytes make libp2p raise costs the stranger its connection
            logger.debug("inbound connection dropped address=%s error=%r", address, exc)
            return None
        finally:
            self._pending.pop(stream, None)
        raw.budget = None
        return connection

    async def _is_let_in(self, connection: Any) -> bool:
        """Wait until the peer is admitted; close its connection if that takes too long."""
        peer = PeerId(str(connection.peer_id))
        with trio.move_on_after(_ADMISSION_S):
            while not connection.event_shutting_down.is_set() and not self._is_admitted(peer):  # noqa: ASYNC110 - libp2p's event
                await trio.sleep(_CHECK_ADMISSION_S)
        if self._is_admitted(peer):
            return True
        for known in list(self._network.get_connections(connection.peer_id)):
            if known.muxed_conn is connection:
                await known.close()
        return False
