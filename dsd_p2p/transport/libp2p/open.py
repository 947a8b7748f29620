"""Opens a libp2p host for this project: switches parts of libp2p off and installs the guards."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import libp2p.network.swarm
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP

from dsd_p2p.errors import ConfigError
from dsd_p2p.transport.identity import load_or_create_seed
from dsd_p2p.transport.libp2p import relay
from dsd_p2p.transport.libp2p.guard import (
    Doorman,
    install_gate,
    install_private_network,
    limit_upgrade,
)
from dsd_p2p.transport.libp2p.host import Libp2pTransport
from dsd_p2p.transport.libp2p.sockets import check_listen
from dsd_p2p.transport.libp2p.streams import reset

logger = logging.getLogger(__name__)

_UPGRADE_TIMEOUT_S = 4.0
"""Shorter than a dial's deadline, because a dial that is cancelled from outside leaks one of libp2p's slots."""


@asynccontextmanager
async def open_libp2p(
    *,
    identity: Path,
    listen: str,
    protocol: str,
    max_frame_bytes: int,
    network_key: bytes | None = None,
    is_relay: bool = False,
) -> AsyncIterator[Libp2pTransport]:
    """Run a host.

    identity: the file with its seed. listen: a multiaddr like `/ip4/127.0.0.1/tcp/0`.
    network_key: 32 bytes that all peers of a private network share. is_relay: relay connections between other peers.

    Raises:
        ConfigError: the host cannot listen on the address, or the identity file is unusable.
    """
    _quieten()
    listen_address = check_listen(listen)
    private_key = Ed25519PrivateKey.from_bytes(load_or_create_seed(identity))
    key_pair = KeyPair(private_key, private_key.get_public_key())
    host = new_host(
        key_pair=key_pair,
        transports=[TCP()],
        sec_opt={NOISE_ID: NoiseTransport(key_pair, noise_privkey=new_x25519_key_pair().private_key)},
        muxer_opt={YAMUX_ID: Yamux},
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(max_connections_per_peer=2, inbound_upgrade_timeout=_UPGRADE_TIMEOUT_S + 1),
        psk=network_key.hex() if network_key else None,
    )
    install_private_network()
    network = host.get_network()
    limit_upgrade(network, _UPGRADE_TIMEOUT_S)
    network.retry_config = RetryConfig(max_retries=0)
    network.auto_connector.maybe_connect = _never_connect
    network.set_stream_handler(_guarded(network.common_stream_handler))
    async with host.run(listen_addrs=[listen_address]):
        try:
            if not host.get_transport_addrs():
                raise ConfigError(f"cannot listen on {listen}: choose another address with --listen")
            circuits = relay.Relay(host) if is_relay else relay.accepting(host)
            async with background_trio_service(circuits), trio.open_nursery() as nursery:
                transport = Libp2pTransport(host, protocol, max_frame_bytes, nursery)
                Doorman(network, transport.is_admitted)
                install_gate(host, protocol, transport.is_admitted)
                transport.addresses = tuple(str(address) for address in host.get_addrs())
                host.set_stream_handler(protocol, transport.read)
                yield transport
                transport.close()
                nursery.cancel_scope.cancel()
        finally:
            # Leaving `host.run` does not close its sockets; they would stay open until the process ends.
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await network.close()


def _quieten() -> None:
    """Undo py-libp2p's changes to logging, and shorten its wait before it tries a second address family."""
    logging.getLogger("libp2p").addHandler(logging.NullHandler())
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    libp2p.network.swarm._HAPPY_EYEBALLS_DELAY = 0.02


async def _never_connect(*_args: object, **_kwargs: object) -> None:
    """Do nothing, in place of libp2p's auto-connector, which would dial known peers on its own."""


def _guarded(handler: Any) -> Any:
    """Return the handler with its exceptions caught: in libp2p one, from a few junk bytes, would end the whole host."""

    async def handle(stream: Any) -> None:
        try:
            await handler(stream)
        except Exception as exc:  # task boundary: drops this one stream, whatever the peer did to break it
            logger.warning("stream dropped peer=%s error=%r", stream.muxed_conn.peer_id, exc)
            await reset(stream)

    return handle
