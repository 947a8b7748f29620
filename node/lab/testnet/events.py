"""What the processes of a testnet report, one JSON object a line on a shared pipe; each fits into one atomic write."""

import msgspec

from node.config import ServeFlags
from node.local.events import Failed, Loading, Ready, Started
from node.local.pipe import Report


class StartNode(msgspec.Struct, tag="node"):
    """Run a node of a swarm, its passes `slowdown` times as long as they need, in a network namespace (empty: ours)."""

    index: int
    config: ServeFlags
    namespace: str
    slowdown: float


class StartClient(msgspec.Struct, tag="client"):
    """Write answers one after another until told to stop.

    prompts: token ids. deadline_s: of one answer, after which it counts as hung. namespace: of the network.
    record: file that the client's telemetry is appended to.
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


Command = StartNode | StartClient


class Asking(msgspec.Struct, tag="asking"):
    """A client begins an answer."""

    prompt: int


class Answered(msgspec.Struct, tag="answered"):
    """A client's answer has ended.

    tokens: all that were written, finished or not. error: what ended it early, by its type; empty when it is whole.
    pauses_s: for each time the route was lost, seconds between the tokens before and after. resumes: of those, where stages went on
        with what they held.
    """

    prompt: int
    tokens: list[int]
    error: str
    text: str
    is_hung: bool
    seconds: float
    pauses_s: list[float]
    resumes: int


Event = Started | Loading | Ready | Failed | Asking | Answered


_decoder = msgspec.json.Decoder(Report[Event])


def parse(line: bytes) -> Report[Event]:
    """Return the report of a line.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(line)
