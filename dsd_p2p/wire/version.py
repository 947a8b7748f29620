"""Defines the protocol's version. Peers of different versions refuse each other, with an error that names both."""

PROTOCOL_VERSION = 11
"""Goes up by one with every change that an older peer would misread (docs/protocol.md)."""

PROTOCOL_ID = f"/dsd/{PROTOCOL_VERSION}"
"""The name of the stream protocol that libp2p negotiates."""
