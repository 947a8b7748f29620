"""Every error a caller of the library can meet.

    DsdError
    ├── ConfigError            what the user asked for cannot be done as asked
    ├── ModelError             weights, tokenizer or architecture are missing, broken or unsupported
    ├── CapacityError          a budget is full; the same request may pass later or elsewhere
    ├── LocalProtocolError     our own code broke the protocol: a bug
    └── PeerError              a peer or the way to it failed; the only kind that is retried
        ├── RemoteProtocolError    the peer broke the protocol
        ├── PeerDisconnected       the connection is gone
        ├── PeerTimeout            the peer did not answer before the deadline
        ├── DishonestPeer          the peer computed something else than it was asked, and signed it
        ├── PrefixLost             a stage no longer holds the text that a session was to go on from
        └── CoverageLost           nobody who is alive and reachable serves some of the layers

The text of each says what to do next.
"""


class DsdError(Exception):
    """Base of everything raised on purpose."""


class ConfigError(DsdError):
    """What the user asked for cannot be done as asked."""


class ModelError(DsdError):
    """Weights, tokenizer or architecture are missing, broken or unsupported."""


class CapacityError(DsdError):
    """A budget is full; the same request may pass later or elsewhere."""


class LocalProtocolError(DsdError):
    """Our own code broke the protocol: a bug, please report it."""


class PeerError(DsdError):
    """A peer or the way to it failed."""


class RemoteProtocolError(PeerError):
    """The peer sent something the protocol does not allow: names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} is {value!r:.80}, allowed is {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class PeerDisconnected(PeerError):  # noqa: N818 - reads as the event it reports
    """The connection to a peer is gone."""


class PeerTimeout(PeerError):  # noqa: N818 - reads as the event it reports
    """A peer did not answer before the deadline."""


class DishonestPeer(PeerError):  # noqa: N818 - reads as what it reports
    """A peer computed something else than it was asked, or does not show what it computed: names it."""

    def __init__(self, peer: str, text: str) -> None:
        super().__init__(f"peer {peer} is not to be trusted: {text}")
        self.peer = peer


class PrefixLost(PeerError):  # noqa: N818 - reads as the event it reports
    """A stage no longer holds the text that a session was to go on from."""


class CoverageLost(PeerError):  # noqa: N818 - reads as the event it reports
    """Nobody who is alive and reachable serves some of the layers."""


def first_cause(error: BaseException) -> BaseException:
    """Return the first error inside nested exception groups, or `error` itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
