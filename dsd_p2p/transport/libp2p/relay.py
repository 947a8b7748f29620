"""Circuit relay v2: reaches a peer that cannot be dialled, through a relay that both can reach.

py-libp2p's own client makes reservations without being asked, and its relay ends a circuit when another one to the same
target ends (docs/adr/0002-libp2p.md). So this module exchanges the few messages and copies the data itself.
"""

import logging
import time
from contextlib import suppress
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as CircuitPeer
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID, CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr

logger = logging.getLogger(__name__)

CIRCUIT = "/p2p-circuit"
_LIMITS = RelayLimits(3600, 1 << 30, 8, 64, 3600)
"""Seconds and bytes per circuit, circuits per target, reservations in all, seconds per reservation."""

_OK = 100
_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 30.0
_CHECK_CONNECTED_S = 0.25


class Relay(CircuitV2Protocol):
    """The relay's service. Its own copy loop ends both directions of its circuit at once and keeps the time limit."""

    def __init__(self, host: Any) -> None:
        super().__init__(host, limits=_LIMITS, allow_hop=True)
        self._scopes: dict[frozenset[int], list[trio.CancelScope]] = {}

    async def _relay_data(
        self, src_stream: Any, dst_stream: Any, peer_id: Any, deadline: Any = None, circuit_data_limit: Any = None
    ) -> None:
        circuit = frozenset((id(src_stream), id(dst_stream)))
        scope = trio.CancelScope(deadline=trio.current_time() + self.limits.duration)
        self._scopes.setdefault(circuit, []).append(scope)
        try:
            with scope:
                while data := await src_stream.read(64 << 10):
                    if circuit_data_limit is not None:
                        circuit_data_limit[0] -= len(data)
                        if circuit_data_limit[0] < 0:
                            break
                    with trio.fail_after(self.write_timeout):
                        await dst_stream.write(data)
        except Exception as exc:  # task boundary: either end is gone, in whatever way libp2p puts it
            logger.debug("circuit ended error=%r", exc)
        finally:
            # Our own reset does not wake our own pending read, so cancel the other direction.
            for each in self._scopes.pop(circuit, ()):
                each.cancel()
            self._active_relays.pop(peer_id, None)
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                for stream in (src_stream, dst_stream):
                    with suppress(Exception):
                        await stream.reset()


def accepting(host: Any) -> CircuitV2Protocol:
    """Return the service of a peer that accepts relayed connections."""
    return CircuitV2Protocol(host)


def is_relayed(connection: Any) -> bool:
    """True if the connection, also a stream's, goes through a relay."""
    return bool(connection.get_connection_type() is ConnectionType.RELAYED)


async def dial_relayed(host: Any, address: str) -> None:
    """Connect to the peer of `/ip4/…/p2p/RELAY/p2p-circuit/p2p/TARGET`.

    Raises:
        SwarmException: the relay cannot be reached, or the peer has no reservation there.
    """
    relay_part, _, target_part = address.partition(f"{CIRCUIT}/p2p/")
    target = ID.from_string(target_part)
    if host.get_network().get_connections(target):
        return
    message = HopMessage(type=HopMessage.CONNECT, peer=CircuitPeer(id=target.to_bytes()))
    stream, _ = await _ask(host, info_from_p2p_addr(Multiaddr(relay_part)), message)
    raw = RawConnection(stream, True, ConnectionType.RELAYED, [Multiaddr(address)])
    await host.upgrade_outbound_connection(raw, target)


async def keep_reserved(host: Any, address: str) -> None:
    """Hold a reservation at the relay at `address`; renew it in time and after every loss, until cancelled."""
    relay = info_from_p2p_addr(Multiaddr(address))
    backoff_s = _FIRST_BACKOFF_S
    while True:
        try:
            with trio.fail_after(_TIMEOUT_S):
                held_s = await _reserve(host, relay)
        except Exception as exc:  # whatever the relay does, the next try is ours
            logger.warning("reservation failed relay=%s error=%s", address, exc)
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            continue
        logger.info("reserved at relay=%s for_s=%.0f", address, held_s)
        backoff_s = _FIRST_BACKOFF_S
        with trio.move_on_after(max(1.0, min(held_s / 3, 60.0))):
            # A reservation is valid only while we are connected.
            while host.get_network().get_connections(relay.peer_id):  # noqa: ASYNC110 - libp2p tells nobody
                await trio.sleep(_CHECK_CONNECTED_S)


async def _reserve(host: Any, relay: PeerInfo) -> float:
    """Reserve at the relay and return how many seconds the reservation lasts."""
    stream, answer = await _ask(host, relay, HopMessage(type=HopMessage.RESERVE))
    with suppress(Exception):
        await stream.reset()
    return float(answer.reservation.expire) - time.time()


async def _ask(host: Any, relay: PeerInfo, message: HopMessage) -> tuple[Any, HopMessage]:
    host.get_network().unblock_peer(relay.peer_id)
    await host.connect(relay)
    stream = await host.new_stream(relay.peer_id, [PROTOCOL_ID])
    try:
        await write_delimited_msg(stream, message)
        answer: HopMessage = await read_delimited_msg(stream, HopMessage)
        _check(answer)
    except BaseException:
        with trio.CancelScope(shield=True), trio.move_on_after(1), suppress(Exception):
            await stream.reset()
        raise
    return stream, answer


def _check(answer: HopMessage) -> None:
    if answer.status != _OK:
        raise SwarmException(f"the relay refused with status {answer.status}: does the peer have a reservation there?")
