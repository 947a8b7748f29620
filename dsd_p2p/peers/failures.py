"""Translates our errors to failures on the wire and back."""

from dsd_p2p.errors import (
    CapacityError,
    ConfigError,
    CoverageLost,
    DsdError,
    ModelError,
    PeerDisconnected,
    PeerError,
    PeerLeaving,
    PeerTimeout,
    PrefixLost,
    RemoteProtocolError,
)
from dsd_p2p.wire.messages import FailureKind


def kind_of(error: DsdError) -> FailureKind:
    """Return the kind of failure to report to a peer for our error."""
    match error:
        case CapacityError():
            return FailureKind.CAPACITY
        case RemoteProtocolError():
            return FailureKind.PROTOCOL
        case PeerTimeout():
            return FailureKind.TIMEOUT
        case PrefixLost():
            return FailureKind.PREFIX
        case CoverageLost():
            return FailureKind.COVERAGE
        case PeerLeaving():
            return FailureKind.LEAVING
        case PeerError():
            return FailureKind.ROUTE
        case ConfigError():
            return FailureKind.REQUEST
        case _:
            return FailureKind.MODEL


def error_of(kind: FailureKind, text: str) -> DsdError:
    """Return the error for a failure that a peer reports."""
    match kind:
        case FailureKind.CAPACITY:
            return CapacityError(text)
        case FailureKind.MODEL:
            return ModelError(text)
        case FailureKind.ROUTE:
            return PeerDisconnected(text)
        case FailureKind.LEAVING:
            return PeerLeaving(text)
        case FailureKind.TIMEOUT:
            return PeerTimeout(text)
        case FailureKind.COVERAGE:
            return CoverageLost(text)
        case FailureKind.PREFIX:
            return PrefixLost(text)
        case FailureKind.REQUEST:
            return ConfigError(text)
        case FailureKind.PROTOCOL:
            return RemoteProtocolError("our message", text, "one that the peer accepts")
