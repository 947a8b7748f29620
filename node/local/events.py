"""What node processes tell the process that started them, one JSON object a line on standard output."""

import msgspec

from node.local.pipe import Report


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


_decoder = msgspec.json.Decoder(Report[StageEvent])


def parse(line: bytes) -> Report[StageEvent]:
    """Return the report of a line.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(line)
