"""One member of a swarm at work: shows its grants, checks others', tells and hears who is alive, keeps connected to all.

Heartbeats and records travel on the streams that windows use, not over GossipSub: a ninth of the CPU and a quarter of the delay for
eight members (docs/adr/0006-membership-on-our-own-streams.md).
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from dsd_p2p.errors import CapacityError, ConfigError, PeerError, RemoteProtocolError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.services import Handler
from dsd_p2p.swarm.keys import SigningKey
from dsd_p2p.swarm.records import sign_record
from dsd_p2p.swarm.registry import DEAF_BEATS, REFRESH_S, Registry
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId, PeerInfo, UniformRng
from dsd_p2p.wire.membership import (
    MAX_MEMBERS,
    Grant,
    Heartbeat,
    MemberRecord,
    Members,
    MemberState,
    NodeProfile,
    Revocation,
    Role,
)
from dsd_p2p.wire.messages import Hello, Message

logger = logging.getLogger(__name__)

_DIAL_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0
_YIELD_S = 3.0
"""Of two members that see each other at the same time the one with the greater id waits this long before it dials."""

_MIN_SYNC_S = 1.0
"""Least time between two exchanges of everything known with the same peer."""

_GOODBYE_S = 1.0
_MAX_FOUND = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What our stage holds right now."""

    num_sessions: int = 0
    cache_bytes: int = 0


class Membership:
    """A door for `PeerLinks` and a service of `dsd_p2p.peers.services`. Set `links` before it starts.

    grants: what lets us in elsewhere. bootstrap: addresses to try when we are connected to nobody.
    load: what our stage holds. unix: seconds since 1970.
    last_failure, is_refused: why the last attempt to reach a member failed, and whether that member does not want us.
    """

    def __init__(
        self,
        key: SigningKey,
        grants: tuple[Grant, ...],
        registry: Registry,
        *,
        bootstrap: Sequence[str],
        unix: Callable[[], float],
        rng: UniformRng,
        version: str = "",
    ) -> None:
        self.links: PeerLinks
        self.grants = grants
        self.registry = registry
        self.bootstrap = tuple(bootstrap)
        self._found: tuple[str, ...] = ()
        self.load: Callable[[], Load] = Load
        self.last_failure = ""
        self.is_refused = False
        self._key = key
        self._unix = unix
        self._rng = rng
        self._version = version
        self._incarnation = int(unix() * 1000)
        self._beat = self._incarnation
        self._profile = NodeProfile()
        self._state = MemberState.JOINING
        self._changed = trio.Event()
        self._met = trio.Event()
        self._connected_at_s: dict[PeerId, float] = {}
        self._synced_at_s: dict[PeerId, float] = {}
        self._next_dial_s: dict[str, float] = {}
        self._backoff_s: dict[str, float] = {}
        self._dialing: set[str] = set()
        self._nursery: trio.Nursery | None = None

    # The door

    def admit(self, peer: PeerId, hello: Hello) -> None:
        """Let a member in.

        Raises:
            RemoteProtocolError: it is none.
        """
        role = self.registry.admit(peer, hello.grants, self._unix())
        if role is Role.CLIENT and hello.sender.span is not None:
            raise RemoteProtocolError("span", str(hello.sender.span), "none: its invite is for clients")
        logger.info("member let in peer=%s role=%s", peer, role)
        self._met.set()

    # What we say of ourselves

    async def announce(self, info: PeerInfo, state: MemberState, profile: NodeProfile | None = None) -> None:
        """Tell everybody what we are from now on."""
        self.links.me = info
        self._state = state
        self._profile = profile or self._profile
        await self._tell_all(Members(records=(self._renew(),)))

    async def revoke(self, revocation: Revocation) -> None:
        """Take in the owner's revocation and tell everybody.

        Raises:
            RemoteProtocolError: the owner did not sign it.
        """
        if self.registry.revoke(revocation):
            await self._tell_all(Members(revocations=(revocation,)))
            self._sweep()

    def also_try(self, address: str) -> None:
        """An address where a member may be, like one of the bootstrap list; the latest few are kept."""
        if address not in (*self.bootstrap, *self._found):
            self._found = (*self._found, address)[-_MAX_FOUND:]
            self._met.set()

    async def leave(self) -> None:
        """Say goodbye, so that nobody has to find out."""
        self._state = MemberState.LEFT
        with trio.CancelScope(shield=True), trio.move_on_after(_GOODBYE_S):
            message = Members(records=(self._renew(),))
            for peer in list(self.links.connected):
                with suppress(PeerError):
                    await self.links.send(peer, message)
            # The writers need a moment; nobody answers a goodbye.
            await trio.sleep(_GOODBYE_S / 4)

    def _renew(self) -> MemberRecord:
        known = self.registry.record_of(PeerId(self.links.me.peer))
        sequence = max(int(self._unix() * 1000), known.sequence + 1 if known else 0)
        record = sign_record(
            MemberRecord(
                info=self.links.me,
                incarnation=self._incarnation,
                sequence=sequence,
                state=self._state,
                grants=self.grants,
                profile=self._profile,
                version=self._version,
            ),
            self._key,
        )
        self.registry.merge(record, self._unix())
        self._note()
        return record

    # The service

    def start(self, nursery: trio.Nursery) -> None:
        """Send heartbeats and keep connected as long as the nursery is open."""
        self._nursery = nursery
        nursery.start_soon(self._beat_forever)
        nursery.start_soon(self._sweep_forever)

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """What it does with each message that it takes."""
        return {Heartbeat: self._hear_beat, Members: self._hear_members}

    async def _hear_beat(self, event: Arrived, heartbeat: Heartbeat) -> None:
        was_alive = self.registry.is_alive(event.sender)
        self.registry.heard(event.sender, heartbeat, trio.current_time())
        if not was_alive:
            # An answer at once tells it the round trip.
            self._met.set()
            self._note()
        if heartbeat.view != self.registry.view:
            self._sync(event.sender)

    async def _hear_members(self, event: Arrived, members: Members) -> None:
        self._merge(event.sender, members)

    def lost(self, event: Lost) -> None:
        """The connection to a peer is gone."""
        self.registry.lost(event.peer)
        for index in (self._connected_at_s, self._synced_at_s):
            index.pop(event.peer, None)
        self._note()

    async def changed(self) -> None:
        """Wait until somebody came, went or changed."""
        await self._changed.wait()

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _merge(self, sender: PeerId, members: Members) -> None:
        news_records: list[MemberRecord] = []
        news_revocations = [revocation for revocation in members.revocations if self._take_in(revocation)]
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
                # Another's record may have expired or been revoked on its way here.
                logger.info("record refused peer=%s from=%s error=%s", record.info.peer, sender, exc)
        if news_records or news_revocations:
            self._note()
            self._pass_on(Members(records=tuple(news_records), revocations=tuple(news_revocations)), but=sender)
        if news_revocations:
            self._sweep()

    def _take_in(self, revocation: Revocation) -> bool:
        try:
            return self.registry.revoke(revocation)
        except CapacityError as exc:
            logger.warning("revocation not kept error=%s", exc)
            return False

    def _refute(self, record: MemberRecord) -> None:
        """Somebody knows a record of ours from a life before this one that looks newer: outdate it."""
        mine = self.registry.record_of(PeerId(self.links.me.peer))
        if mine is not None and record.age > mine.age:
            self._incarnation = record.incarnation + 1
            self._pass_on(Members(records=(self._renew(),)), but=PeerId(""))

    # Heartbeats

    async def _beat_forever(self) -> None:
        while True:
            now_s = trio.current_time()
            self._beat += 1
            self.registry.sent(self._beat, now_s)
            mine = self.registry.record_of(PeerId(self.links.me.peer))
            if mine is not None and self._unix() - mine.sequence / 1e3 > REFRESH_S:
                self._pass_on(Members(records=(self._renew(),)), but=PeerId(""))
            load = self.load()
            self._pass_on(
                self.registry.heartbeat(
                    self._beat, now_s, num_sessions=load.num_sessions, cache_bytes=load.cache_bytes
                ),
                but=PeerId(""),
            )
            self._dial()
            self._met = trio.Event()
            with trio.move_on_after(self.registry.interval_s):
                # Somebody new is greeted with a heartbeat at once.
                await self._met.wait()
                await trio.sleep(0.01)

    async def _sweep_forever(self) -> None:
        pause_s = self.registry.interval_s / 4
        last_s = trio.current_time()
        while True:
            await trio.sleep(pause_s)
            now_s = trio.current_time()
            if now_s - last_s > 2 * pause_s:
                # We were the silent one (stopped, or starved): what waits to be read may be their heartbeats.
                late_s = now_s - last_s
                self.registry.forgive(late_s)
                self._connected_at_s = {peer: at_s + late_s for peer, at_s in self._connected_at_s.items()}
            last_s = now_s
            self._sweep()

    def _sweep(self) -> None:
        """Drop who is silent, deaf, revoked or expired."""
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
            self._note()

    def _pass_on(self, message: Message, *, but: PeerId) -> None:
        for peer in list(self.links.connected):
            if peer != but:
                self._start(self._send, peer, message)

    async def _tell_all(self, message: Members) -> None:
        self._pass_on(message, but=PeerId(""))
        await trio.lowlevel.checkpoint()

    async def _send(self, peer: PeerId, message: Message) -> None:
        """A peer that takes nothing in must not hold the others up; the next heartbeat says it all again."""
        with trio.move_on_after(self.registry.interval_s), suppress(PeerError):
            await self.links.send(peer, message)

    def _sync(self, peer: PeerId) -> None:
        """Send everything known to a peer whose view is another."""
        now_s = trio.current_time()
        if now_s - self._synced_at_s.get(peer, -_MIN_SYNC_S) < _MIN_SYNC_S:
            return
        self._synced_at_s[peer] = now_s
        message = Members(records=self.registry.records[:MAX_MEMBERS], revocations=self.registry.revocations)
        self._start(self._send, peer, message)

    # Connections

    def _dial(self) -> None:
        """Try to reach every node that we are not connected to, and the bootstrap list when we are alone."""
        now_s = trio.current_time()
        for record in self.registry.records:
            peer = PeerId(record.info.peer)
            is_node = record.profile.max_layers > 0 or record.info.span is not None
            if peer == self.links.me.peer or not is_node or record.state is MemberState.LEFT:
                continue
            if peer in self.links.connected:
                self._next_dial_s.pop(peer, None)
                continue
            if peer not in self._next_dial_s:
                self._next_dial_s[peer] = now_s + (_YIELD_S if peer < self.links.me.peer else 0.0)
            self._try(peer, record.info.addresses, now_s)
        if not self.links.connected:
            for address in (*self.bootstrap, *self._found):
                # By peer: two dials of one peer at a time, one of them to where it no longer is, keep each other from succeeding.
                self._try(address.rpartition("/p2p/")[2], (address,), now_s)

    def _try(self, name: str, addresses: Sequence[str], now_s: float) -> None:
        if addresses and name not in self._dialing and now_s >= self._next_dial_s.get(name, 0.0):
            self._dialing.add(name)
            self._start(self._connect, name, addresses)

    async def _connect(self, name: str, addresses: Sequence[str]) -> None:
        try:
            for address in addresses:
                try:
                    await self.links.connect(address, _DIAL_TIMEOUT_S)
                except (PeerError, ConfigError) as exc:
                    logger.info("member not reached address=%s error=%s", address, exc)
                    # That we are not wanted matters more than that somebody is not there.
                    if not self.is_refused:
                        self.last_failure = str(exc)
                    self.is_refused = self.is_refused or "refused us" in self.last_failure
                else:
                    self._backoff_s.pop(name, None)
                    self._met.set()
                    return
            backoff_s = min(2 * self._backoff_s.get(name, _FIRST_BACKOFF_S / 2), _MAX_BACKOFF_S)
            self._backoff_s[name] = backoff_s
            self._next_dial_s[name] = trio.current_time() + backoff_s * (0.5 + self._rng.random() / 2)
        finally:
            self._dialing.discard(name)

    def _start(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        assert self._nursery is not None, "start first"
        self._nursery.start_soon(function, *arguments)
