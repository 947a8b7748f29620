"""Returns the text that a coordinator signs when it opens a session, so that no stage believes another's word for it."""

import msgspec

from dsd_p2p.wire.messages import OpenSession

_DOMAIN = b"dsd-p2p opening 1\0"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(OpenSession)


def signed_opening(opened: OpenSession) -> bytes:
    """Return the bytes that the coordinator signs: the opening as every reader of it would pack it."""
    packed = _encoder.encode(msgspec.structs.replace(opened, signature=b""))
    # A whole number in a field for any number is read as one with a fraction, and would be packed as such.
    return _DOMAIN + _encoder.encode(_decoder.decode(packed))
