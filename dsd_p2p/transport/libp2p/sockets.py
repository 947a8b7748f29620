"""The sockets under libp2p: which address may be listened on, and how TCP paces what is sent."""

import socket
import struct
from contextlib import suppress
from typing import Any

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from dsd_p2p.errors import ConfigError

_TCP_INFO_BYTES = 140
_TOTAL_RETRANSMITS_AT, _SEGMENTS_OUT_AT = 100, 136
_LOSSY_SHARE = 0.005


def check_listen(listen: str) -> Multiaddr:
    """Bind once ourselves: libp2p sets SO_REUSEPORT, so a port in use raises nothing and steals connections."""
    try:
        address = Multiaddr(listen)
        host, port = address.value_for_protocol("ip4"), int(address.value_for_protocol("tcp"))
    except (MultiaddrError, ValueError) as exc:
        raise ConfigError(f"listen address {listen!r}: {exc}; write it as /ip4/127.0.0.1/tcp/PORT") from exc
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(f"cannot listen on {listen}: {exc.strerror}; choose another with --listen") from exc
    return address


def raw_socket(stream: Any) -> Any:
    """The TCP socket under Yamux, Noise and trio."""
    return stream.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream.stream.socket


def set_congestion_control(raw: Any, name: bytes) -> None:
    """Cubic sends a window in one burst, BBR paces it over a round trip but survives loss; a kernel may lack either."""
    with suppress(OSError, AttributeError):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)


def is_lossy(raw: Any) -> bool:
    """True when the kernel had to send more than a few of the connection's segments again."""
    with suppress(OSError, AttributeError, struct.error):
        info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (retransmits,) = struct.unpack_from("<I", info, _TOTAL_RETRANSMITS_AT)
        (segments,) = struct.unpack_from("<I", info, _SEGMENTS_OUT_AT)
        return bool(segments > 1000 and retransmits > _LOSSY_SHARE * segments)
    return False
