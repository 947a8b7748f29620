"""Defines the commands to a testnet's processes and the events that they report.

Events are JSON objects, one a line, on a shared pipe; each fits into one atomic write.
"""

import msgspec

from node.config import NO_GATEWAY, GatewayConfig, ServeFlags
from node.local.events import Failed, GatewayOpen, Loading, Ready, Started
from node.local.pipe import Report


class StartNode(msgspec.Struct, tag="node"):
    """Run a peer's node daemon.

    namespace: its network namespace, empty for ours. slowdown: the factor by which its passes take longer.
    gateway: the API that it serves, if any.
    """

    index: int
    config: ServeFlags
    namespace: str
    slowdown: float
    gateway: GatewayConfig = NO_GATEWAY


class StartClient(msgspec.Struct, tag="client"):
    """Run a client that writes answers one after another until it is told to stop.

    prompts: token ids. deadline_s: the time after which an answer counts as hung. namespace: the network namespace.
    record: the file that the client's telemetry is appended to. draft: its drafter.
    """

    index: int
    swarm: str
    namespace: str
    prompts: list[list[int]]
    max_tokens: int
    seed: int
    deadline_s: float
    heartbeat_s: float
    listen: str
    record: str = ""
    draft: str = "ngram"


Command = StartNode | StartClient


class Asking(msgspec.Struct, tag="asking"):
    """A client begins an answer."""

    prompt: int


class Answered(msgspec.Struct, tag="answered"):
    """A client's answer has ended.

    tokens: everything written, even if the answer is incomplete. error: the type of the error that ended it early, else
    empty. pauses_s: for each lost route, the seconds between the tokens before and after. resumes: how often stages
    went on with what they had kept.
    """

    prompt: int
    tokens: list[int]
    error: str
    text: str
    is_hung: bool
    seconds: float
    pauses_s: list[float]
    resumes: int


Event = Started | Loading | Ready | GatewayOpen | Failed | Asking | Answered


_decoder = msgspec.json.Decoder(Report[Event])


def parse(line: bytes) -> Report[Event]:
    """Return the report in a line.

    Raises:
        msgspec.DecodeError: the line is not a report.
    """
    return _decoder.decode(line)
