"""Defines the events that a stage process reports to its parent, as one JSON object per line on standard output."""

import msgspec

from node.local.pipe import Report


class Started(msgspec.Struct, tag="started"):
    """The process has started."""

    pid: int


class Loading(msgspec.Struct, tag="loading"):
    """The process has begun a step of its startup."""

    what: str


class Ready(msgspec.Struct, tag="ready"):
    """The stage is serving."""

    address: str
    span: str
    weight_bytes: int


class GatewayOpen(msgspec.Struct, tag="gateway"):
    """The gateway is serving at this base URL."""

    url: str


class Failed(msgspec.Struct, tag="failed"):
    """The process could not start, or has ended."""

    text: str


StageEvent = Started | Loading | Ready | GatewayOpen | Failed


_decoder = msgspec.json.Decoder(Report[StageEvent])


def parse(line: bytes) -> Report[StageEvent]:
    """Return the report in a line.

    Raises:
        msgspec.DecodeError: the line is not a report.
    """
    return _decoder.decode(line)
