"""Defines the structs that the members of a swarm sign and exchange about themselves (docs/protocol.md, "Swarm").

`dsd_p2p.swarm` issues, checks and keeps them.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.types import ModelName, Name, PeerInfo

MAX_GRANTS = 4
MAX_MEMBERS = 256
MAX_REVOCATIONS = 1024

KeyBytes = Annotated[bytes, Meta(min_length=32, max_length=32)]
SignatureBytes = Annotated[bytes, Meta(max_length=64)]
UnixSeconds = Annotated[int, Meta(ge=0, le=1 << 40)]
Microseconds = Annotated[int, Meta(ge=0, le=1 << 40)]


class Role(StrEnum):
    """A member's permissions. A stage may do everything that a client may."""

    STAGE = "stage"
    CLIENT = "client"


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """`issuer`'s permission for the holder of the key `subject` to join. Both are ed25519 public keys.

    max_uses: how many other keys the subject may grant permission to.
    """

    issuer: KeyBytes
    subject: KeyBytes
    role: Role
    expires_at_s: UnixSeconds
    max_uses: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    signature: SignatureBytes = b""


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """The owner's revocation of all grants to `subject` (a peer's or an invite's key) and of those based on them."""

    subject: KeyBytes
    signature: SignatureBytes = b""


class OwnerChoice(msgspec.Struct, frozen=True, array_like=True):
    """The swarm owner's settings for all members; a later one replaces an earlier one.

    made_at_ms: milliseconds since 1970. draft: the drafter of requests, "auto" or a name (`dsd create --draft`).
    """

    made_at_ms: Annotated[int, Meta(ge=0, le=1 << 50)]
    draft: ModelName = "auto"
    signature: SignatureBytes = b""


class MemberState(StrEnum):
    """The state of a member's process."""

    JOINING = "joining"
    SERVING = "serving"
    DRAINING = "draining"
    LEFT = "left"


class PeerProfile(msgspec.Struct, frozen=True, array_like=True):
    """A peer's measurements of itself, and what it offers.

    layer_us, layer16_us: microseconds for one layer's pass over 1 and over 16 positions.
    max_layers: how many layers fit into its memory.
    drafter: the drafter with which it coordinates requests of thin clients; empty if it does not coordinate any.
    draft_us: microseconds of one of its steps; 0 for prompt lookup.
    """

    layer_us: Microseconds = 0
    layer16_us: Microseconds = 0
    max_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    drafter: Name = ""
    draft_us: Microseconds = 0


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """A member's signed description of itself. A greater (incarnation, sequence) replaces a smaller one.

    incarnation: when the member's process started. sequence: when it made this record. Both in milliseconds since 1970.
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
        """The pair that orders the records of one peer; the greater one is newer."""
        return self.incarnation, self.sequence


class Heard(msgspec.Struct, frozen=True, array_like=True):
    """An echo of a neighbour's last heartbeat.

    beat: its number. held_us: time since the sender received it. round_trip_us: to that neighbour, 0 if unknown.
    """

    peer: Name
    beat: Annotated[int, Meta(ge=0, le=1 << 50)]
    held_us: Microseconds
    round_trip_us: Microseconds


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Member → every connected member, once each interval, on its own connection; so it needs no signature.

    beat: grows by one each time. interval_ms: time to the next heartbeat; a member that misses two is considered gone.
    view: a hash of all records and revocations that the sender knows. A receiver with another view sends its own.
    num_sessions, cache_bytes: in use at the sender's stage. heard: the neighbours whose heartbeats it receives.
    """

    beat: Annotated[int, Meta(ge=0, le=1 << 50)]
    view: Annotated[bytes, Meta(min_length=8, max_length=8)]
    interval_ms: Annotated[int, Meta(ge=50, le=10_000)] = 1000
    num_sessions: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    cache_bytes: Annotated[int, Meta(ge=0, le=1 << 60)] = 0
    heard: Annotated[tuple[Heard, ...], Meta(max_length=MAX_MEMBERS)] = ()


class Members(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Member → member: records, revocations and the owner's choice, which the receiver may not know yet."""

    records: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_MEMBERS)] = ()
    revocations: Annotated[tuple[Revocation, ...], Meta(max_length=MAX_REVOCATIONS)] = ()
    choice: OwnerChoice | None = None


class Rekey(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """Member → member: the owner's new key for the private network. Whoever is revoked must not get it.

    made_at_ms: milliseconds since 1970; a later key replaces an earlier one. revocations: all that hold by then.
    signature: the owner's, over all other fields.
    """

    made_at_ms: Annotated[int, Meta(ge=0, le=1 << 50)]
    key: KeyBytes
    revocations: Annotated[tuple[Revocation, ...], Meta(max_length=MAX_REVOCATIONS)] = ()
    signature: SignatureBytes = b""
