"""Signs and checks records, which describe a member and may be passed on by anybody."""

import msgspec

from dsd_p2p.errors import LocalProtocolError, RemoteProtocolError
from dsd_p2p.keys import SigningKey, is_signed_by, public_of
from dsd_p2p.wire.membership import MemberRecord

_DOMAIN = b"dsd-p2p record 1\0"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MemberRecord)


def sign_record(record: MemberRecord, key: SigningKey) -> MemberRecord:
    """Return the record with its peer's signature.

    Raises:
        LocalProtocolError: a field is outside what members accept: they would drop us for it.
    """
    signed = msgspec.structs.replace(record, signature=key.sign(_signed_part(record)))
    try:
        return _decoder.decode(_encoder.encode(signed))
    except msgspec.DecodeError as exc:
        raise LocalProtocolError("record", str(exc), "what other members accept") from exc


def check_record(record: MemberRecord) -> None:
    """Check that the peer described by a record signed it, and that its span is inside the model.

    Raises:
        RemoteProtocolError: the signature or the span is wrong.
    """
    if not is_signed_by(public_of(record.info.peer), record.signature, _signed_part(record)):
        raise RemoteProtocolError(
            "record signature", record.info.peer, "a signature by the peer that the record describes"
        )
    span = record.info.span
    if span is not None and not span.first < span.last <= record.info.num_layers:
        raise RemoteProtocolError(
            "record span", str(span), f"a span inside the model's {record.info.num_layers} layers"
        )


def _signed_part(record: MemberRecord) -> bytes:
    return _DOMAIN + _encoder.encode(msgspec.structs.replace(record, signature=b""))
