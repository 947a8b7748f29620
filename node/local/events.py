"""What node processes tell the process that started them, one JSON object a line on standard output."""

import os

import msgspec


class Started(msgspec.Struct, tag="started"):
    """The process exists."""

    pid: int


class Loading(msgspec.Struct, tag="loading"):
    """A step of starting up."""

    what: str


class Ready(msgspec.Struct, tag="ready"):
    """The node serves from now on."""

    address: str
    span: str
    weight_bytes: int


class GatewayOpen(msgspec.Struct, tag="door"):
    """The gateway answers at this base URL."""

    url: str


class Failed(msgspec.Struct, tag="failed"):
    """The node could not start, or has ended."""

    text: str


StageEvent = Started | Loading | Ready | GatewayOpen | Failed


class Report(msgspec.Struct):
    """An event and the number of the node it is about."""

    index: int
    event: StageEvent


_decoder = msgspec.json.Decoder(Report)


def report(index: int, event: StageEvent) -> None:
    """Write the event in one piece, so that several processes may share the pipe."""
    os.write(1, msgspec.json.encode(Report(index=index, event=event)) + b"\n")


def parse(line: bytes) -> Report:
    """Return the report of a line.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(line)
