"""What the peers of a swarm sign and tell each other of themselves (docs/protocol.md, "Swarm").

Structs only: `dsd_p2p.swarm` issues, checks and keeps them.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.types import Name, PeerInfo

MAX_GRANTS = 4
MAX_MEMBERS = 256
MAX_REVOCATIONS = 1024

KeyBytes = Annotated[bytes, Meta(min_length=32, max_length=32)]
SignatureBytes = Annotated[bytes, Meta(max_length=64)]
UnixSeconds = Annotated[int, Meta(ge=0, le=1 << 40)]
Microseconds = Annotated[int, Meta(ge=0, le=1 << 40)]


class Role(StrEnum):
    """What a member may do: a stage may also do all that a client may."""

    STAGE = "stage"
    CLIENT = "client"


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """`issuer` lets the holder of `subject`'s key in; both are ed25519 public keys.

    max_uses: how many others the subject may let in by grants of its own.
    """

    issuer: KeyBytes
    subject: KeyBytes
    role: Role
    expires_at_s: UnixSeconds
    max_uses: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    signature: SignatureBytes = b""


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """The owner takes back whatever was granted to `subject`, a peer's or an invite's key, and what that granted on."""

    subject: KeyBytes
    signature: SignatureBytes = b""


class MemberState(StrEnum):
    """Where a member is in its life."""

    JOINING = "joining"
    SERVING = "serving"
    DRAINING = "draining"
    LEFT = "left"


class PeerProfile(msgspec.Struct, frozen=True, array_like=True):
    """What a node measured of itself.

    layer_us, layer16_us: microseconds of one layer's pass over 1 and over 16 positions.
    max_layers: what its memory has room for. drafter: with what it coordinates requests of thin clients; empty does not.
    """

    layer_us: Microseconds = 0
    layer16_us: Microseconds = 0
    max_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    drafter: Name = ""


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of itself, signed by it; a newer (incarnation, sequence) replaces an older one.

    incarnation, sequence: milliseconds since 1970 when it started and when it made this record.
    """

    info: PeerInfo
    incarnation: Annotated[int, Meta(ge=0, le=1 << 50)]
    sequence: Annotated[int, Meta(ge=0, le=1 << 50)]
    state: MemberState
    grants: Annotated[tuple[Grant, ...], Meta(max_length=MAX_GRANTS)]
    profile: PeerProfile = PeerProfile()
    version: Name = ""
    signature: SignatureBytes = b""

    @property
    def age(self) -> tuple[int, int]:
        """What tells a newer record from an older one of the same peer."""
        return self.incarnation, self.sequence


class Heard(msgspec.Struct, frozen=True, array_like=True):
    """A neighbour as the sender knows it: its last beat, for how long that has lain here, the round trip (0: unknown)."""

    peer: Name
    beat: Annotated[int, Meta(ge=0, le=1 << 50)]
    held_us: Microseconds
    round_trip_us: Microseconds


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Member → every connected member, every interval. Sent by itself on its own connection, so it needs no signature.

    beat: grows by one. interval_ms: until the next one; who misses two is dead.
    view: digest of all records and revocations the sender knows; who knows others sends them.
    num_sessions, cache_bytes: in use at its stage. heard: the neighbours whose heartbeats it receives.
    """

    beat: Annotated[int, Meta(ge=0, le=1 << 50)]
    view: Annotated[bytes, Meta(min_length=8, max_length=8)]
    interval_ms: Annotated[int, Meta(ge=50, le=10_000)] = 1000
    num_sessions: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    cache_bytes: Annotated[int, Meta(ge=0, le=1 << 60)] = 0
    heard: Annotated[tuple[Heard, ...], Meta(max_length=MAX_MEMBERS)] = ()


class Members(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Records and revocations the receiver may not know yet."""

    records: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_MEMBERS)] = ()
    revocations: Annotated[tuple[Revocation, ...], Meta(max_length=MAX_REVOCATIONS)] = ()
