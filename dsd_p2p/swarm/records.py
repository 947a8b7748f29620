"""Signed records: what a member says of itself, checked by whoever hears it from anybody."""

import msgspec

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.swarm.keys import SigningKey, is_signed_by, public_of
from dsd_p2p.wire.membership import MemberRecord

_DOMAIN = b"dsd-p2p record 1\0"
_encoder = msgspec.msgpack.Encoder()


def sign_record(record: MemberRecord, key: SigningKey) -> MemberRecord:
    """Return the record with its peer's signature."""
    return msgspec.structs.replace(record, signature=key.sign(_signed_part(record)))


def check_record(record: MemberRecord) -> None:
    """Check that the peer a record is about made it.

    Raises:
        RemoteProtocolError: it did not.
    """
    if not is_signed_by(public_of(record.info.peer), record.signature, _signed_part(record)):
        raise RemoteProtocolError("record signature", record.info.peer, "made by the peer it is about")
    span = record.info.span
    if span is not None and not span.first < span.last <= record.info.num_layers:
        raise RemoteProtocolError("record span", str(span), f"inside the model's {record.info.num_layers} layers")


def _signed_part(record: MemberRecord) -> bytes:
    return _DOMAIN + _encoder.encode(msgspec.structs.replace(record, signature=b""))
