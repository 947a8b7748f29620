"""Defines every error that a caller of the library can meet.

    DsdError
    ├── ConfigError            the user's settings or request are invalid or unsupported
    ├── ModelError             weights, tokenizer or architecture are missing, broken or unsupported
    ├── CapacityError          a budget is full; the same request may succeed later or elsewhere
    ├── LocalProtocolError     our own code broke the protocol: a bug
    └── PeerError              a peer or the connection to it failed; the only kind that is retried
        ├── RemoteProtocolError    the peer broke the protocol
        ├── PeerDisconnected       the connection is gone
        │   └── PeerLeaving            the peer is shutting down
        ├── PeerTimeout            the peer did not answer before the deadline
        ├── DishonestPeer          the peer's result is wrong or unproven
        ├── AuditIncomplete        an audited answer could not be checked
        ├── PrefixLost             a stage no longer holds the text that a session should go on from
        └── CoverageLost           no living, reachable peer serves some of the layers

Each error's message says what to do next.
"""


class DsdError(Exception):
    """Base class of all errors that this library raises on purpose."""


class ConfigError(DsdError):
    """The user's settings or request are invalid or unsupported."""


class ModelError(DsdError):
    """Weights, tokenizer or architecture are missing, broken or unsupported."""


class CapacityError(DsdError):
    """A budget is full; the same request may succeed later or elsewhere."""


class LocalProtocolError(DsdError):
    """Our own code broke the protocol. This is a bug: please report it."""


class PeerError(DsdError):
    """A peer or the connection to it failed."""


class RemoteProtocolError(PeerError):
    """The peer sent something that the protocol does not allow. The message names field, value and limit."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field}: expected {limit}, got {value!r:.80}")
        self.field = field
        self.value = value
        self.limit = limit


class PeerDisconnected(PeerError):  # noqa: N818 - reads as the event it reports
    """The connection to a peer is gone."""


class PeerLeaving(PeerDisconnected):
    """A peer is shutting down: it accepts nothing new, and will not again."""


class PeerTimeout(PeerError):  # noqa: N818 - reads as the event it reports
    """A peer did not answer before the deadline."""


class DishonestPeer(PeerError):  # noqa: N818 - reads as what it reports
    """A peer computed a wrong result, or gave no proof of its result. The message names the peer."""

    def __init__(self, peer: str, text: str) -> None:
        super().__init__(f"peer {peer} cannot be trusted: {text}")
        self.peer = peer


class AuditIncomplete(PeerError):  # noqa: N818 - reads as what it reports
    """An audited answer, or a part of it, could not be checked. No lie is proved.

    peer: the one that did not show what it computed, if it failed for that.
    """

    def __init__(self, text: str, peer: str = "") -> None:
        super().__init__(text)
        self.peer = peer


class PrefixLost(PeerError):  # noqa: N818 - reads as the event it reports
    """A stage no longer holds the text that a session should go on from."""


class CoverageLost(PeerError):  # noqa: N818 - reads as the event it reports
    """No living, reachable peer serves some of the layers."""


def first_cause(error: BaseException) -> BaseException:
    """Return the first error inside nested exception groups, or `error` itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
