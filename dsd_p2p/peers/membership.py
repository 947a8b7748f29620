"""Runs one member of a swarm: exchanges heartbeats and records, drops dead and revoked members, and keeps it connected.

Heartbeats and records use the same streams as windows, not GossipSub: for eight members this takes a ninth of the CPU
and a quarter of the delay (docs/adr/0006-membership-on-our-own-streams.md).
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from dsd_p2p.errors import CapacityError, PeerError, RemoteProtocolError
from dsd_p2p.keys import SigningKey
from dsd_p2p.peers.dialer import Dialer
from dsd_p2p.peers.gatekeeper import Bell, SwarmGatekeeper
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.own_record import OwnRecord
from dsd_p2p.peers.services import Handler
from dsd_p2p.swarm.records import check_record
from dsd_p2p.swarm.registry import DEAF_BEATS, REFRESH_S, check_age
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId, PeerInfo, UniformRng, short_peer
from dsd_p2p.wire.membership import (
    MAX_MEMBERS,
    Heartbeat,
    MemberRecord,
    Members,
    MemberState,
    OwnerChoice,
    PeerProfile,
    Revocation,
)
from dsd_p2p.wire.messages import Message

logger = logging.getLogger(__name__)


_MIN_SYNC_S = 1.0
"""Minimum time between two sends of everything known to the same peer."""

_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The current load of our stage."""

    num_sessions: int = 0
    cache_bytes: int = 0


class Membership:
    """The service (`dsd_p2p.peers.services`) that makes a peer a member, on the links that `gatekeeper` guards.

    own: makes our records. dialer: keeps us connected. unix: returns seconds since 1970. load: returns our stage's
    load.
    """

    def __init__(
        self,
        links: PeerLinks,
        gatekeeper: SwarmGatekeeper,
        own: OwnRecord,
        dialer: Dialer,
        unix: Callable[[], float],
        load: Callable[[], Load] = Load,
    ) -> None:
        self.links = links
        self.registry = gatekeeper.registry
        self.dialer = dialer
        self._own = own
        self._unix = unix
        self._load = load
        self._beat = own.incarnation
        self._changed = Bell()
        # Rings for new peers, which get a heartbeat at once.
        self._met = gatekeeper.met
        self._connected_at_s: dict[PeerId, float] = {}
        self._synced_at_s: dict[PeerId, float] = {}
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        alive = [short_peer(member.peer) for member in self.registry.members() if member.is_alive]
        return f"<member {short_peer(self.links.me.peer)} {self._own.state.value}, alive: {', '.join(alive)}>"

    # Our own state

    async def announce(self, info: PeerInfo, state: MemberState, profile: PeerProfile | None = None) -> None:
        """Update our record and send it to all connected members."""
        self.links.me = info
        self._own.state = state
        self._own.profile = profile or self._own.profile
        await self._tell_all(Members(records=(self._renew(),)))

    async def revoke(self, revocation: Revocation) -> None:
        """Apply the owner's revocation and send it to all connected members.

        Raises:
            RemoteProtocolError: the owner did not sign it.
            CapacityError: there are too many revocations.
        """
        if self.registry.admission.revoke(revocation):
            await self._tell_all(Members(revocations=(revocation,)))
            self._sweep()

    async def choose(self, choice: OwnerChoice) -> None:
        """Apply the owner's choice and send it to all connected members.

        Raises:
            RemoteProtocolError: the owner did not sign it.
        """
        if self.registry.choose(choice, self._unix()):
            self._changed.ring()
            await self._tell_all(Members(choice=choice))

    async def leave(self) -> None:
        """Tell all connected members that we leave, so that they need not wait for missing heartbeats."""
        self._own.state = MemberState.LEFT
        with trio.CancelScope(shield=True), trio.move_on_after(_GOODBYE_S):
            message = Members(records=(self._renew(),))
            for peer in list(self.links.connected):
                with suppress(PeerError):
                    await self.links.send(peer, message)
            # Give the writers a moment, because nobody answers a goodbye.
            await trio.sleep(_GOODBYE_S / 4)

    def _renew(self) -> MemberRecord:
        record = self._own.renewed(self.links.me, self.registry.record_of(PeerId(self.links.me.peer)))
        self.registry.merge(record, self._unix())
        self._changed.ring()
        return record

    # The service

    def start(self, nursery: trio.Nursery) -> None:
        """Send heartbeats and keep us connected as long as the nursery is open."""
        self._nursery = nursery
        nursery.start_soon(self._beat_forever)
        nursery.start_soon(self._sweep_forever)

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handlers of heartbeats and of records and revocations."""
        return {Heartbeat: self._hear_beat, Members: self._hear_members}

    async def _hear_beat(self, event: Arrived, heartbeat: Heartbeat) -> None:
        was_alive = self.registry.is_alive(event.sender)
        self.registry.heard(event.sender, heartbeat, trio.current_time())
        if not was_alive:
            # A heartbeat sent back at once gives it the round trip.
            self._met.ring()
            self._changed.ring()
        if heartbeat.view != self.registry.view:
            self._sync(event.sender)

    async def _hear_members(self, event: Arrived, members: Members) -> None:
        self._merge(event.sender, members)

    def lost(self, event: Lost) -> None:
        """Note that the connection to a peer is gone."""
        self.registry.lost(event.peer)
        for index in (self._connected_at_s, self._synced_at_s):
            index.pop(event.peer, None)
        self._changed.ring()

    async def changed(self) -> None:
        """Wait until a member comes, goes or changes."""
        await self._changed.wait()

    def _merge(self, sender: PeerId, members: Members) -> None:
        news_records: list[MemberRecord] = []
        news_revocations = self._take_in_all(members.revocations)
        for record in members.records:
            try:
                if PeerId(record.info.peer) == self.links.me.peer:
                    self._refute(record)
                elif self.registry.merge(record, self._unix()):
                    news_records.append(record)
            except CapacityError as exc:
                logger.warning("record not kept peer=%s error=%s", record.info.peer, exc)
            except RemoteProtocolError as exc:
                if record.info.peer == sender:
                    raise
                # Another member's record may have expired or been revoked on its way here.
                logger.info("record refused peer=%s from=%s error=%s", record.info.peer, sender, exc)
        choice = members.choice if members.choice and self.registry.choose(members.choice, self._unix()) else None
        if news_records or news_revocations or choice:
            self._changed.ring()
            news = Members(records=tuple(news_records), revocations=tuple(news_revocations), choice=choice)
            self.pass_on(news, but=sender)
        if news_revocations:
            self._sweep()

    def take_revocations(self, revocations: Sequence[Revocation]) -> None:
        """Apply revocations at once, without passing them on.

        Raises:
            RemoteProtocolError: the owner did not sign one of them.
        """
        self._take_in_all(revocations)
        self._sweep()

    def pass_on(self, message: Message, *, but: PeerId | None = None) -> None:
        """Send a message to all connected members that may be here, except one."""
        unwanted = {but, *(peer for peer, _ in self.registry.admission.overdue(self._unix()))}
        for peer in self.links.connected - unwanted:
            self._start(self._send, peer, message)

    def _take_in_all(self, revocations: Sequence[Revocation]) -> list[Revocation]:
        return [revocation for revocation in revocations if self._take_in(revocation)]

    def _take_in(self, revocation: Revocation) -> bool:
        try:
            return self.registry.admission.revoke(revocation)
        except CapacityError as exc:
            logger.warning("revocation not kept error=%s", exc)
            return False

    def _refute(self, record: MemberRecord) -> None:
        """Outdate a record of ours from an earlier incarnation that somebody knows and that looks newer than ours.

        Raises:
            RemoteProtocolError: we never signed it, or its time is far ahead.
        """
        mine = self.registry.record_of(PeerId(self.links.me.peer))
        if mine is not None and record.age > mine.age:
            check_age(record, self._unix())
            check_record(record)
            self._own.incarnation = record.incarnation + 1
            self.pass_on(Members(records=(self._renew(),)))

    # Heartbeats

    async def _beat_forever(self) -> None:
        while True:
            now_s = trio.current_time()
            self._beat += 1
            self.registry.sent(self._beat, now_s)
            mine = self.registry.record_of(PeerId(self.links.me.peer))
            if mine is not None and self._unix() - mine.sequence / 1e3 > REFRESH_S:
                self.pass_on(Members(records=(self._renew(),)))
            load = self._load()
            self.pass_on(
                self.registry.heartbeat(
                    self._beat, now_s, num_sessions=load.num_sessions, cache_bytes=load.cache_bytes
                ),
            )
            if self._nursery is not None:
                self.dialer.dial(self.registry.records, self._nursery)
            with trio.move_on_after(self.registry.interval_s):
                await self._met.wait()
                await trio.sleep(0.01)

    async def _sweep_forever(self) -> None:
        pause_s = self.registry.interval_s / 4
        last_s = trio.current_time()
        while True:
            await trio.sleep(pause_s)
            now_s = trio.current_time()
            if now_s - last_s > 2 * pause_s:
                # We did not run (stopped or starved), so members' heartbeats may still wait to be read.
                late_s = now_s - last_s
                self.registry.forgive(late_s)
                self._connected_at_s = {peer: at_s + late_s for peer, at_s in self._connected_at_s.items()}
            last_s = now_s
            self._sweep()

    def _sweep(self) -> None:
        """Drop members that are silent, deaf, revoked or expired."""
        now_s = trio.current_time()
        gone = self.registry.sweep(now_s, self._unix())
        swept = {peer for peer, _ in gone}
        for peer in self.links.connected - swept:
            connected_at_s = self._connected_at_s.setdefault(peer, now_s)
            if not self.registry.is_alive(peer) and now_s - connected_at_s > DEAF_BEATS * self.registry.interval_s:
                gone.append((peer, "sends no heartbeats"))
        for peer, reason in gone:
            record = self.registry.record_of(peer)
            has_left = record is not None and record.state is MemberState.LEFT
            logger.log(logging.INFO if has_left else logging.WARNING, "member gone peer=%s reason=%s", peer, reason)
            if peer in self.links.connected:
                self._start(self.links.transport.disconnect, peer, reason)
        if gone:
            self._changed.ring()

    async def _tell_all(self, message: Members) -> None:
        self.pass_on(message)
        await trio.lowlevel.checkpoint()

    async def _send(self, peer: PeerId, message: Message) -> None:
        """Send, but give up after one interval, because the next heartbeat makes up for a lost message.

        A peer that reads nothing must not hold up the others.
        """
        with trio.move_on_after(self.registry.interval_s), suppress(PeerError):
            await self.links.send(peer, message)

    def _sync(self, peer: PeerId) -> None:
        """Send everything known to a peer whose view differs from ours."""
        now_s = trio.current_time()
        if now_s - self._synced_at_s.get(peer, -_MIN_SYNC_S) < _MIN_SYNC_S:
            return
        self._synced_at_s[peer] = now_s
        message = Members(
            records=self.registry.records[:MAX_MEMBERS],
            revocations=self.registry.admission.revocations,
            choice=self.registry.choice,
        )
        self._start(self._send, peer, message)

    def _start(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        assert self._nursery is not None, "start first"
        self._nursery.start_soon(function, *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipSettings:
    """Settings of a member.

    bootstrap: addresses of members. unix: returns seconds since 1970. rng: varies the dialer's pauses. version: our
    software's.
    """

    bootstrap: Sequence[str]
    unix: Callable[[], float]
    rng: UniformRng
    version: str = ""


def open_membership(
    links: PeerLinks,
    gatekeeper: SwarmGatekeeper,
    key: SigningKey,
    settings: MembershipSettings,
    load: Callable[[], Load] = Load,
) -> Membership:
    """Return a member whose records `key` signs, on links that `gatekeeper` guards. load: returns our stage's load."""
    own = OwnRecord(key, gatekeeper.grants, settings.unix, settings.version)
    dialer = Dialer(links, settings.bootstrap, settings.rng, gatekeeper.met)
    return Membership(links, gatekeeper, own, dialer, settings.unix, load)
