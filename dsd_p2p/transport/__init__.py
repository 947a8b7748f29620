"""Frames between peers: in memory, over libp2p, and either of them with a wide-area link's delays added."""
