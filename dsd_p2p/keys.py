"""Ed25519 keys and libp2p's peer ids. An id contains the public key, so it suffices to check a signature."""

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.types import PeerId

_IDENTITY_MULTIHASH = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
"""Start of a peer id: an identity hash of 36 bytes of protobuf with key type 1 (ed25519) and 32 bytes of key (libp2p's
peer id specification)."""


class SigningKey:
    """A secret key. seed: its 32 bytes."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: bytes = self._private.public_key().public_bytes_raw()

    @property
    def peer(self) -> PeerId:
        """The peer id of this key."""
        return peer_of(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature."""
        return self._private.sign(message)


def is_signed_by(public: bytes, signature: bytes, message: bytes) -> bool:
    """True if the holder of `public`'s secret signed `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_of(public: bytes) -> PeerId:
    """Return the peer id of a public key."""
    return PeerId(base58.b58encode(_IDENTITY_MULTIHASH + public).decode())


def public_of(peer: str) -> bytes:
    """Return the public key inside a peer id.

    Raises:
        RemoteProtocolError: it is not the id of an ed25519 key.
    """
    try:
        decoded = base58.b58decode(peer)
    except ValueError:
        decoded = b""
    if len(decoded) != len(_IDENTITY_MULTIHASH) + 32 or not decoded.startswith(_IDENTITY_MULTIHASH):
        raise RemoteProtocolError("peer id", peer, "the id of an ed25519 key")
    return decoded[len(_IDENTITY_MULTIHASH) :]
