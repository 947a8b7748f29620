"""Returns the text that a coordinator signs when it opens a session, so that no stage believes another's word for it."""

import msgspec

from dsd_p2p.wire.messages import OpenSession

_DOMAIN = b"dsd-p2p opening 1\0"
_encoder = msgspec.msgpack.Encoder()


def signed_opening(opened: OpenSession) -> bytes:
    """Return the bytes that the coordinator signs."""
    return _DOMAIN + _encoder.encode(msgspec.structs.replace(opened, signature=b""))
