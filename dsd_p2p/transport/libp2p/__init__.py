"""Peers over libp2p. The only package that imports it; what it needs from its caller is in docs/adr/0002-libp2p.md."""

from dsd_p2p.transport.libp2p.host import Libp2pTransport
from dsd_p2p.transport.libp2p.open import open_libp2p

__all__ = ["Libp2pTransport", "open_libp2p"]
