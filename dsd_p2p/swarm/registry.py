"""Holds what one peer knows about its swarm: the records, the living members and the revocations. No I/O and no clock.

Callers pass the time by two clocks: `now_s` is monotonic and for liveness, `unix_s` is for the expiry of grants. A
member is alive as long as its own heartbeats arrive on its own connection. What others say about it only helps to find
it.
"""

import hashlib
from dataclasses import dataclass, field

from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.swarm.admission import Admission
from dsd_p2p.swarm.grants import is_choice_valid
from dsd_p2p.swarm.records import check_record
from dsd_p2p.types import PeerId
from dsd_p2p.wire.membership import (
    MAX_MEMBERS,
    Heard,
    Heartbeat,
    MemberRecord,
    MemberState,
    OwnerChoice,
    Role,
)

MISSED_BEATS = 2
"""A member whose heartbeats are missing for this many intervals is dead."""

DEAF_BEATS = 4
"""A member that does not list us among those it hears for this many intervals has a one-way link and counts as dead."""

REFRESH_S = 600.0
"""A member makes a new record at least this often."""

_FORGET_AFTER_S = 3600.0
_MAX_CLOCK_SKEW_S = 3600.0
"""Times of signed words may be so much ahead of our clock."""

_MAX_BEATS_REMEMBERED = 64


@dataclass(slots=True, kw_only=True)
class _Liveness:
    heartbeat: Heartbeat
    heard_at_s: float
    round_trip_s: float | None = None
    deaf_since_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member as this peer sees it.

    round_trip_s: to us; None before it is measured. neighbours_s: the round trips that the member measured to others.
    """

    record: MemberRecord
    is_alive: bool
    round_trip_s: float | None = None
    num_sessions: int = 0
    cache_bytes: int = 0
    neighbours_s: dict[str, float] = field(default_factory=dict)

    @property
    def peer(self) -> PeerId:
        """The member's peer id."""
        return PeerId(self.record.info.peer)


def check_age(record: MemberRecord, unix_s: float) -> None:
    """Check that neither time of a record is far ahead of our clock.

    Raises:
        RemoteProtocolError: one is.
    """
    ahead_s = max(record.age) / 1e3 - unix_s
    if ahead_s > _MAX_CLOCK_SKEW_S:
        raise RemoteProtocolError(
            "record time", f"{ahead_s:.0f} s ahead", "a time near our clock (synchronise the clocks by NTP)"
        )


def _check_client(record: MemberRecord) -> None:
    """Refuse a client that offers more than requests: nobody may plan with it, dial it or hand it a request."""
    offers = {
        "span": record.info.span,
        "max_layers": record.profile.max_layers,
        "drafter": record.profile.drafter,
    }
    for name, offered in offers.items():
        if offered:
            raise RemoteProtocolError(name, str(offered), "none, because its invite is for clients")


class Registry:
    """The members of a swarm as one of them sees it.

    swarm: the owner's public key. interval_s: time between our heartbeats; other members' heartbeats state their own.
    admission: decides who belongs to the swarm.
    """

    def __init__(self, *, me: PeerId, swarm: bytes, interval_s: float, admission: Admission | None = None) -> None:
        self.me = me
        self.swarm = swarm
        self.interval_s = interval_s
        self._records: dict[PeerId, MemberRecord] = {}
        self._alive: dict[PeerId, _Liveness] = {}
        self.admission = admission or Admission(swarm)
        self.choice: OwnerChoice | None = None
        self._sent_at_s: dict[int, float] = {}
        self._digest: bytes | None = None
        self._num_revocations = 0

    def choose(self, choice: OwnerChoice, unix_s: float) -> bool:
        """Take the owner's choice for all members; return whether it replaces an older one.

        Raises:
            RemoteProtocolError: the owner did not sign it, or its time is ahead of ours.
        """
        if self.choice is not None and choice.made_at_ms <= self.choice.made_at_ms:
            return False
        if not is_choice_valid(choice, self.swarm):
            raise RemoteProtocolError("choice signature", choice.signature.hex()[:12], "the swarm owner's")
        if choice.made_at_ms / 1e3 > unix_s + _MAX_CLOCK_SKEW_S:
            raise RemoteProtocolError(
                "choice time", choice.made_at_ms, "a time near our clock (synchronise the clocks by NTP)"
            )
        self.choice = choice
        self._digest = None
        return True

    # Records

    def merge(self, record: MemberRecord, unix_s: float) -> bool:
        """Add a record, from whomever it came; return whether it is newer than the known one.

        Raises:
            RemoteProtocolError: its peer did not sign it or does not belong to the swarm, or its time or span is wrong.
            CapacityError: the swarm is full.
        """
        peer = PeerId(record.info.peer)
        known = self._records.get(peer)
        made_at_s = record.sequence / 1e3
        if (known is not None and record.age <= known.age) or made_at_s < unix_s - _FORGET_AFTER_S:
            return False
        check_age(record, unix_s)
        check_record(record)
        role = self.admission.admit(peer, record.grants, unix_s)
        if role is Role.CLIENT:
            _check_client(record)
        if known is None and len(self._records) >= MAX_MEMBERS and not self._evict():
            raise CapacityError(f"the swarm is full: it has {MAX_MEMBERS} members")
        self._records[peer] = record
        self._digest = None
        if record.state is MemberState.LEFT:
            self._alive.pop(peer, None)
        return True

    def record_of(self, peer: PeerId) -> MemberRecord | None:
        """Return the newest record of a peer, or None."""
        return self._records.get(peer)

    @property
    def records(self) -> tuple[MemberRecord, ...]:
        """The newest record of every known member."""
        return tuple(self._records.values())

    @property
    def view(self) -> bytes:
        """An eight-byte hash of all known records, revocations and the owner's choice, equal for peers that know the same."""
        if self._digest is None or self._num_revocations != len(self.admission.revocations):
            self._num_revocations = len(self.admission.revocations)
            lines = sorted(repr((peer, *record.age)) for peer, record in self._records.items())
            lines += sorted(each.subject.hex() for each in self.admission.revocations)
            lines.append(str(self.choice.made_at_ms if self.choice else 0))
            self._digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
        return self._digest

    def _evict(self) -> bool:
        """Forget the absent member with the oldest record; return whether there was one."""
        gone = [peer for peer in self._records if peer not in self._alive and peer != self.me]
        if not gone:
            return False
        del self._records[min(gone, key=lambda peer: self._records[peer].sequence)]
        return True

    # Liveness

    def sent(self, beat: int, now_s: float) -> None:
        """Note when we sent a heartbeat, so that its echo gives the round trip."""
        self._sent_at_s[beat] = now_s
        while len(self._sent_at_s) > _MAX_BEATS_REMEMBERED:
            del self._sent_at_s[next(iter(self._sent_at_s))]

    def heard(self, peer: PeerId, heartbeat: Heartbeat, now_s: float) -> None:
        """Add a heartbeat that arrived on the peer's own connection."""
        known = self._alive.get(peer)
        if known is not None and heartbeat.beat <= known.heartbeat.beat:
            return
        round_trip_s = known.round_trip_s if known else None
        for echo in heartbeat.heard:
            sent_at_s = self._sent_at_s.get(echo.beat) if echo.peer == self.me else None
            if sent_at_s is not None:
                measured_s = max(0.0, now_s - sent_at_s - echo.held_us / 1e6)
                # Take a smaller value at once and a larger one slowly: a busy loop does not make the link longer.
                round_trip_s = (
                    measured_s if round_trip_s is None else min(measured_s, round_trip_s * 0.8 + measured_s * 0.2)
                )
        is_deaf = all(echo.peer != self.me for echo in heartbeat.heard)
        deaf_since_s = (known.deaf_since_s if known and known.deaf_since_s is not None else now_s) if is_deaf else None
        self._alive[peer] = _Liveness(
            heartbeat=heartbeat, heard_at_s=now_s, round_trip_s=round_trip_s, deaf_since_s=deaf_since_s
        )

    def lost(self, peer: PeerId) -> None:
        """Note that the connection is gone: the peer is dead to us until we hear it again."""
        self._alive.pop(peer, None)
        self.admission.lost(peer)

    def forgive(self, seconds: float) -> None:
        """Do not count `seconds`, in which we could not hear anybody, as silence."""
        for liveness in self._alive.values():
            liveness.heard_at_s += seconds
            if liveness.deaf_since_s is not None:
                liveness.deaf_since_s += seconds

    def sweep(self, now_s: float, unix_s: float) -> list[tuple[PeerId, str]]:
        """Forget members that are silent or may not be here any more; return each with the reason."""
        gone = self.admission.overdue(unix_s)
        for peer, liveness in list(self._alive.items()):
            silent_s = now_s - liveness.heard_at_s
            theirs_s = liveness.heartbeat.interval_ms / 1e3
            deaf_s = DEAF_BEATS * max(self.interval_s, theirs_s)
            if silent_s > MISSED_BEATS * theirs_s:
                gone.append((peer, f"not heard for {silent_s:.1f} s"))
            elif liveness.deaf_since_s is not None and now_s - liveness.deaf_since_s > deaf_s:
                gone.append((peer, "does not hear us"))
        for peer, record in list(self._records.items()):
            if peer == self.me:
                continue
            if why := self.admission.why_not(record.grants, unix_s):
                gone.append((peer, why))
            elif peer in self._alive or unix_s - record.sequence / 1e3 < _FORGET_AFTER_S:
                continue
            del self._records[peer]
            self._digest = None
        reasons = dict(gone)
        for peer in reasons:
            self._alive.pop(peer, None)
        return list(reasons.items())

    def heartbeat(self, beat: int, now_s: float, *, num_sessions: int, cache_bytes: int) -> Heartbeat:
        """Return our next heartbeat."""
        return Heartbeat(
            beat=beat,
            view=self.view,
            interval_ms=round(self.interval_s * 1e3),
            num_sessions=num_sessions,
            cache_bytes=cache_bytes,
            heard=tuple(
                Heard(
                    peer=peer,
                    beat=liveness.heartbeat.beat,
                    held_us=max(0, int((now_s - liveness.heard_at_s) * 1e6)),
                    round_trip_us=0 if liveness.round_trip_s is None else max(1, round(liveness.round_trip_s * 1e6)),
                )
                for peer, liveness in self._alive.items()
            ),
        )

    def is_alive(self, peer: PeerId) -> bool:
        """True if the peer's heartbeats arrive, or it is this peer."""
        return peer in self._alive or peer == self.me

    def members(self) -> list[Member]:
        """Return all known members, ourselves included."""
        return [self._member(record) for record in self._records.values()]

    def _member(self, record: MemberRecord) -> Member:
        peer = PeerId(record.info.peer)
        liveness = self._alive.get(peer)
        if liveness is None:
            is_me = peer == self.me
            neighbours = self._own_round_trips() if is_me else {}
            return Member(record=record, is_alive=is_me, round_trip_s=0.0 if is_me else None, neighbours_s=neighbours)
        return Member(
            record=record,
            is_alive=True,
            round_trip_s=liveness.round_trip_s,
            num_sessions=liveness.heartbeat.num_sessions,
            cache_bytes=liveness.heartbeat.cache_bytes,
            neighbours_s={
                heard.peer: heard.round_trip_us / 1e6 for heard in liveness.heartbeat.heard if heard.round_trip_us
            },
        )

    def _own_round_trips(self) -> dict[str, float]:
        return {
            str(peer): liveness.round_trip_s
            for peer, liveness in self._alive.items()
            if liveness.round_trip_s is not None
        }
