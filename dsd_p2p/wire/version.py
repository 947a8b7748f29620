"""The protocol's version: peers of different versions refuse each other by name."""

PROTOCOL_VERSION = 6
"""Raised by one with every change that an older peer would misread (docs/protocol.md)."""

PROTOCOL_ID = f"/dsd/{PROTOCOL_VERSION}"
"""Stream protocol, as negotiated by libp2p."""
