"""The transport over libp2p, and the only package that imports it; docs/adr/0002-libp2p.md lists the workarounds."""

from dsd_p2p.transport.libp2p.host import Libp2pTransport
from dsd_p2p.transport.libp2p.open import open_libp2p

__all__ = ["Libp2pTransport", "open_libp2p"]
