"""Encodes messages as frames and decodes frames.

A frame is `version: u8 | header length: u24 little endian | header: MessagePack | payload: raw bytes`. The payload
holds hidden states, row-major; only a `Window` between stages and the messages of spot checks have one. The transport
adds the frame's length (docs/protocol.md).
"""

import math
from typing import NamedTuple

import msgspec

from dsd_p2p.errors import LocalProtocolError, RemoteProtocolError
from dsd_p2p.types import TextRequest
from dsd_p2p.wire.messages import Ask, Message, OpenSession, Recompute, Recomputed, Revealed, Window
from dsd_p2p.wire.version import PROTOCOL_VERSION

MAX_FRAME_BYTES = 64 << 20
"""Room for 1024 positions of a model with H = 16384 in float32."""

_MAX_HEADER_BYTES = 1 << 20
_PREFIX_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Frame(NamedTuple):
    """A decoded frame; `payload` is a view into the received bytes."""

    message: Message
    payload: memoryview


def encode(message: Message, payload: bytes | memoryview = b"") -> bytes:
    """Return the frame of `message`.

    Raises:
        LocalProtocolError: the frame would be larger than `MAX_FRAME_BYTES`.
    """
    header = _encoder.encode(message)
    frame = b"".join((bytes((PROTOCOL_VERSION,)), len(header).to_bytes(3, "little"), header, payload))
    if len(frame) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"frame of {len(frame)} bytes exceeds {MAX_FRAME_BYTES}: send smaller windows")
    return frame


def decode(frame: bytes) -> Frame:
    """Decode and check a frame from a peer.

    Raises:
        RemoteProtocolError: the frame is invalid. The text names the field, its value and the limit.
    """
    if not _PREFIX_BYTES < len(frame) <= MAX_FRAME_BYTES:
        raise RemoteProtocolError("frame length", len(frame), f"{_PREFIX_BYTES + 1}..{MAX_FRAME_BYTES} bytes")
    if frame[0] != PROTOCOL_VERSION:
        raise RemoteProtocolError("protocol version", frame[0], str(PROTOCOL_VERSION))
    header_bytes = int.from_bytes(frame[1:_PREFIX_BYTES], "little")
    available_bytes = min(len(frame) - _PREFIX_BYTES, _MAX_HEADER_BYTES)
    if not 0 < header_bytes <= available_bytes:
        raise RemoteProtocolError("header length", header_bytes, f"1..{available_bytes} bytes")
    view = memoryview(frame)
    try:
        message = _decoder.decode(view[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError("header", str(exc), "a message as in docs/protocol.md") from exc
    payload = view[_PREFIX_BYTES + header_bytes :]
    _check(message, len(payload))
    return Frame(message, payload)


def _check_text(text: TextRequest) -> None:
    relaxed = () if text.relaxation is None else msgspec.structs.astuple(text.relaxation)[1:]
    numbers = (text.sampling.temperature, text.sampling.top_p, *relaxed)
    if not all(math.isfinite(number) for number in numbers):
        raise RemoteProtocolError("text", "some that are not", "finite numbers")


def _check(message: Message, payload_bytes: int) -> None:
    """Check the rules that the field types cannot express."""
    if isinstance(message, OpenSession | Ask | Recompute):
        _check_text(message.text)
    if isinstance(message, OpenSession):
        if any(hop.span.first >= hop.span.last for hop in message.route):
            raise RemoteProtocolError("route span", [str(hop.span) for hop in message.route], "first < last")
        if message.formats and len(message.formats) != len(message.route) - 1:
            raise RemoteProtocolError(
                "formats", len(message.formats), f"{len(message.route) - 1}, one for each link, or none"
            )
        if message.kept and len(message.kept) != len(message.route):
            raise RemoteProtocolError("kept", len(message.kept), f"{len(message.route)}, one for each stage, or none")
    if isinstance(message, Revealed | Recompute | Recomputed):
        return
    if not isinstance(message, Window):
        if payload_bytes:
            raise RemoteProtocolError("payload length", payload_bytes, f"0 bytes for {type(message).__name__}")
        return
    num_nodes = len(message.tokens)
    if len(message.parents) != num_nodes or len(message.positions) != num_nodes:
        raise RemoteProtocolError(
            "window lengths",
            (num_nodes, len(message.parents), len(message.positions)),
            "as many parents and positions as tokens",
        )
    if any(top.offset >= num_nodes or len(top.tokens) != len(top.centinats) for top in message.drafts):
        raise RemoteProtocolError(
            "drafts", len(message.drafts), "offsets within the window, and one log probability for each token"
        )
    if message.first_node < 0:
        raise RemoteProtocolError("first_node", message.first_node, ">= 0")
