"""Handles the sockets under libp2p: checks listen addresses and chooses TCP's congestion control."""

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
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


def check_listen(listen: str) -> Multiaddr:
    """Return the parsed listen address after binding it once as a test.

    libp2p sets SO_REUSEPORT, so listening on a port in use would raise nothing and steal connections.

    Raises:
        ConfigError: the address cannot be parsed or bound.
    """
    try:
        address = Multiaddr(listen)
        (family,) = (protocol.name for protocol in address.protocols() if protocol.name in _FAMILIES)
        host, port = address.value_for_protocol(family), int(address.value_for_protocol("tcp"))
    except (MultiaddrError, ValueError) as exc:
        raise ConfigError(
            f"listen address {listen!r} cannot be read ({exc}): write it as /ip4/127.0.0.1/tcp/PORT or /ip6/::1/tcp/PORT"
        ) from exc
    with socket.socket(_FAMILIES[family]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(f"cannot listen on {listen}: {exc.strerror}; choose another with --listen") from exc
    return address


def raw_socket(stream: Any) -> Any:
    """Return the TCP socket under Yamux, Noise and trio."""
    return stream.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream.stream.socket


def set_congestion_control(raw: Any, name: bytes) -> None:
    """Set the congestion control if the kernel has it.

    Cubic sends a window in one burst. BBR spreads it over a round trip but copes with loss.
    """
    with suppress(OSError, AttributeError):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)


def is_lossy(raw: Any) -> bool:
    """True if the kernel had to resend more than a few of the connection's segments."""
    with suppress(OSError, AttributeError, struct.error):
        info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (retransmits,) = struct.unpack_from("<I", info, _TOTAL_RETRANSMITS_AT)
        (segments,) = struct.unpack_from("<I", info, _SEGMENTS_OUT_AT)
        return bool(segments > 1000 and retransmits > _LOSSY_SHARE * segments)
    return False
