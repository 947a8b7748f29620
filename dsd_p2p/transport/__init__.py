"""Transports of frames between peers: in memory, over libp2p, or either with the delays of an emulated link."""
