"""What a node process tells the process that started it, one JSON object a line on standard output."""

import sys
from typing import Any

import msgspec


class Loading(msgspec.Struct, tag="loading"):
    """A step of starting up."""

    what: str


class Ready(msgspec.Struct, tag="ready"):
    """The node serves from now on."""

    address: str
    span: str
    weight_bytes: int


class Failed(msgspec.Struct, tag="failed"):
    """The node could not start; it exits."""

    text: str


NodeEvent = Loading | Ready | Failed

_decoder: msgspec.json.Decoder[NodeEvent] = msgspec.json.Decoder(NodeEvent)


def report(event: NodeEvent) -> None:
    """Print the event."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


def parse(line: bytes) -> Any:
    """Return the event of a line, None when it is none."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None
