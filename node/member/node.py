"""One node of a swarm: joins, takes the layers that help most, serves, fills gaps, leaves politely."""

import logging
import os
import random
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from importlib.metadata import version

import msgspec
import trio

from dsd_p2p import units
from dsd_p2p.coordination.engine import Engine
from dsd_p2p.coordination.for_others import CoordinatorService, ThinClient
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import ConfigError, DsdError, PeerDisconnected
from dsd_p2p.models.architecture import read_model_config, shape_of
from dsd_p2p.models.describe import stage_info
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import SpanModel
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.membership import Load, Membership
from dsd_p2p.peers.services import Service, run_services
from dsd_p2p.placement.span import choose_move, choose_span
from dsd_p2p.placement.view import NodeView
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.swarm.grants import check_grants
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.transport.base import Transport
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import Libp2pTransport, open_libp2p
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.wcdnn.bundled import learned_policy
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.membership import MemberState, NodeProfile
from dsd_p2p.wire.version import PROTOCOL_ID
from node.config import GatewayConfig, ServeFlags
from node.gateway.setup import read_clients
from node.local.events import DoorOpen, Loading, NodeEvent, Ready
from node.local.stage_models import load_span
from node.member.client import next_coordinator
from node.member.control import Answer, Ask, Done, MemberStatus, NodeStatus, Revoke, Status, Stop, serve_control
from node.member.gateway import NodeParts, serve_door, swarm_topics, telling
from node.member.lan import neighbours
from node.member.measure import Machine
from node.member.reachable import reachable_addresses
from node.member.state import Known, StoredMembership, SwarmState
from node.watch.telemetry import EventHub, broker_of, check_collector

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 20.0
_CHECK_S = 0.1
_SETTLE_BEATS = 2.5
"""Heartbeats to listen to before choosing layers: by then everybody was heard."""

_GAP_BEATS = 2.0
"""A gap that is younger may only be a restart."""

_REMEMBER_S = 10.0
_REPORT_CHANGE = 1.25
_DRAIN_S = 10.0


class SwarmNode:
    """The node's parts and what it does with them. `run` until stopped."""

    def __init__(
        self,
        config: ServeFlags,
        state: SwarmState,
        source: ModelSource,
        profile: NodeProfile,
        report: Callable[[NodeEvent], None],
        door: GatewayConfig,
        machine: Machine,
    ) -> None:
        self._machine = machine
        self._config = config
        self._door = door
        self._clients = read_clients(door)
        self._hub = EventHub()
        self._state = state
        self._stored: StoredMembership = state.membership()
        self._source = source
        self._drafter = _drafter(config.draft)
        self._profile = msgspec.structs.replace(profile, drafter=self._drafter.name if self._drafter else "")
        self._report = report
        self._model: SpanModel | None = None
        self._engine: Engine | None = None
        self._shape = shape_of(read_model_config(source.folder))
        self._scope = trio.CancelScope()
        self._member_state = MemberState.JOINING

    async def run(self) -> None:
        """Join and serve until told to stop.

        Raises:
            ConfigError, ModelError: it cannot start as configured.
            PeerDisconnected: the swarm does not let us in.
        """
        stored, config = self._stored, self._config
        if not 0.05 <= units.seconds(config.heartbeat) <= 10:
            raise ConfigError(f"--heartbeat {config.heartbeat}: 50ms to 10s")
        broker_of(config.mqtt, config.mqtt_ca, swarm_topics(stored))
        check_collector(config.otlp)
        check_grants(stored.grants, swarm=stored.swarm, peer=self._state.node_key().peer, now_s=time.time())
        async with open_libp2p(
            identity=self._state.identity,
            listen=config.listen,
            protocol=PROTOCOL_ID,
            max_frame_bytes=MAX_FRAME_BYTES,
            network_key=stored.network_key,
            is_relay=config.relay,
        ) as inner:
            inner.addresses = reachable_addresses(inner.addresses, config.announce)
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of links and retries
            async with emulate(inner, config.link_model(), rng) as transport:
                self._assemble(inner, transport, rng)
                async with self._neighbours():
                    await self._serve()

    def _neighbours(self) -> AbstractAsyncContextManager[None]:
        addresses = [address for address in self._inner.addresses if "/ip4/127." not in address]
        if not self._config.lan or not addresses:
            return nullcontext()
        return neighbours(
            network_key=self._stored.network_key,
            peer=self._state.node_key().peer,
            addresses=addresses,
            found=self._membership.also_try,
        )

    def _assemble(self, inner: Libp2pTransport, transport: Transport, rng: random.Random) -> None:
        stored, key = self._stored, self._state.node_key()
        registry = Registry(me=key.peer, swarm=stored.swarm, interval_s=units.seconds(self._config.heartbeat))
        _recall(registry, self._state.known())
        self._inner = inner
        self._membership = Membership(
            key,
            stored.grants,
            registry,
            bootstrap=stored.bootstrap,
            unix=time.time,
            rng=rng,
            version=version("dsd-p2p"),
        )
        self._links = PeerLinks(transport, self._info(None), door=self._membership)
        self._membership.links = self._links
        self._server = StageServer(self._links, None, StageLimits(dials_routes=False), time.perf_counter, sign=key.sign)
        self._membership.load = self._load
        self._directory = SwarmDirectory(
            self._membership,
            model=self._source.key(stored.dtype),
            num_layers=self._shape.num_layers,
        )

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, self._state.control_socket, self._answer)
            nursery.start_soon(self._stop_on_signal)
            with self._scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(run_services, self._links, self._services(inner))
                    if self._config.through:
                        self._inner.be_reachable_through(self._config.through)
                    await self._join()
                    await self._take_span(self._first_span())
                    inner.start_soon(self._remember_forever)
                    inner.start_soon(self._report_forever)
                    async with telling(self._parts(), self._hub):
                        if self._door.port is not None:
                            inner.start_soon(
                                serve_door,
                                self._parts(),
                                self._door,
                                self._clients,
                                self._hub,
                                _coordinating_policy,
                                lambda url: self._report(DoorOpen(url=url)),
                            )
                        await self._keep_placed()
            nursery.cancel_scope.cancel()

    def _services(self, nursery: trio.Nursery) -> list[Service]:
        services: list[Service] = [self._membership, self._server]
        if self._drafter is not None:
            self._engine = Engine(self._links, self._drafter, self._shape.vocab_size, nursery, self._directory)
            services += [self._engine, CoordinatorService(self._engine, _coordinating_policy)]
        me = self._links.transport.peer
        choose = partial(next_coordinator, self._directory, me)
        self._thin = ThinClient(self._links, choose, self._shape.vocab_size)
        return [*services, self._thin]

    def _parts(self) -> NodeParts:
        return NodeParts(
            config=self._config,
            stored=self._stored,
            source=self._source,
            membership=self._membership,
            directory=self._directory,
            server=self._server,
            engine=self._engine,
            thin=self._thin,
            budget=lambda: self._model.budget if self._model else None,
            state=lambda: self._member_state,
            shape=self._shape,
        )

    # Joining

    async def _join(self) -> None:
        """Meet the swarm, unless we are its first node or the others are down.

        Raises:
            PeerDisconnected: we are not let in.
        """
        self._report(Loading(what="meet the swarm"))
        await self._membership.announce(self._info(None), MemberState.JOINING, self._profile)
        others = [record for record in self._membership.registry.records if record.info.peer != self._links.me.peer]
        if not self._stored.bootstrap and not others:
            return
        with trio.move_on_after(_JOIN_TIMEOUT_S):
            while not self._links.connected and not self._membership.is_refused:
                with trio.move_on_after(_CHECK_S):
                    await self._membership.changed()
        # A node that belongs here already serves alone while the others are down; one that is not wanted does not.
        if not self._links.connected and (self._membership.is_refused or not others):
            raise PeerDisconnected(f"cannot join the swarm: {self._membership.last_failure or 'nobody answered'}")
        await trio.sleep(_SETTLE_BEATS * self._membership.registry.interval_s)

    def _first_span(self) -> Span:
        view = self._directory.view(with_joining=True)
        return choose_span(view, self._node_view())

    def _node_view(self) -> NodeView:
        return NodeView(
            peer=self._membership.registry.me,
            max_layers=self._profile.max_layers,
            layer_s=self._profile.layer_us / 1e6,
            layer16_s=self._profile.layer16_us / 1e6,
        )

    # Layers

    async def _take_span(self, span: Span) -> None:
        """Load a span, keeping the layers that are here already, and serve it."""
        if self._model is None:
            # Others count on it while it loads, so that nobody takes the same gap.
            await self._membership.announce(self._info(span), MemberState.JOINING)
        self._report(Loading(what=f"load {self._stored.model} {span}"))
        model = await trio.to_thread.run_sync(self._load_model, span)
        self._links.me = self._info(span)
        await self._server.serve_span(self._machine.serve(model))
        self._model = model
        self._member_state = MemberState.SERVING
        await self._membership.announce(self._info(span), MemberState.SERVING)
        logger.info("serving span=%s", span)
        self._report(Ready(address=self._inner.addresses[0], span=str(span), weight_bytes=model.weight_bytes))

    def _load_model(self, span: Span) -> SpanModel:
        return load_span(self._source, span, self._config, self._stored.dtype, donor=self._model)

    async def _keep_placed(self) -> None:
        """Close gaps that nobody else closes."""
        interval_s = self._membership.registry.interval_s
        while True:
            with trio.move_on_after(2 * interval_s):
                await self._membership.changed()
            if not self._directory.view(with_joining=True).uncovered():
                continue
            await trio.sleep(_GAP_BEATS * interval_s)
            move = await trio.to_thread.run_sync(choose_move, self._directory.view(with_joining=True))
            if move is not None and move.peer == self._links.me.peer and self._model is not None:
                logger.warning("gap found, moving from=%s to=%s", self._model.span, move.span)
                await self._take_span(move.span)

    async def _report_forever(self) -> None:
        """Tell others when passes take another time than they did."""
        while True:
            await trio.sleep(_REMEMBER_S)
            measured = self._server.measured_layer_s()
            if measured is None:
                continue
            layer_us, layer16_us = (max(1, round(seconds * 1e6)) for seconds in measured)
            ratio = layer16_us / max(1, self._profile.layer16_us)
            if not 1 / _REPORT_CHANGE < ratio < _REPORT_CHANGE:
                self._profile = msgspec.structs.replace(self._profile, layer_us=layer_us, layer16_us=layer16_us)
                await self._membership.announce(self._links.me, self._member_state, self._profile)

    # Leaving

    async def _stop(self, drain_s: float) -> None:
        """Take no new sessions, let those under way end, say goodbye."""
        if self._member_state is not MemberState.DRAINING:
            self._member_state = MemberState.DRAINING
            await self._membership.announce(self._links.me, MemberState.DRAINING)
            await self._server.drain(drain_s)
            await self._membership.leave()
        self._scope.cancel()

    async def _stop_on_signal(self) -> None:
        """The first signal drains, the second does not wait for what is under way."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                async for _ in signals:
                    if self._member_state is MemberState.DRAINING:
                        self._scope.cancel()
                        return
                    nursery.start_soon(self._stop, _DRAIN_S)

    # What we tell commands

    async def _answer(self, ask: Ask) -> Answer:
        match ask:
            case Status():
                return self._status()
            case Stop(drain_s=drain_s):
                await self._stop(drain_s)
                return Done()
            case Revoke(revocation=revocation):
                await self._membership.revoke(revocation)
                self._remember()
                return Done()

    def _status(self) -> NodeStatus:
        me, load = self._links.me, self._load()
        return NodeStatus(
            peer=me.peer,
            pid=os.getpid(),
            addresses=list(self._inner.addresses),
            model=self._stored.model,
            dtype=self._stored.dtype,
            span=str(me.span or ""),
            state=self._member_state,
            num_layers=self._shape.num_layers,
            num_sessions=load.num_sessions,
            cache_bytes=load.cache_bytes,
            num_refused=self._links.num_refused,
            num_frames=self._links.num_frames,
            members=member_statuses(self._membership, self._inner),
            uncovered=self._directory.view().uncovered(),
        )

    def _load(self) -> Load:
        cache_bytes = self._model.budget.used_bytes - self._server.parked_bytes if self._model else 0
        return Load(num_sessions=self._server.num_sessions, cache_bytes=cache_bytes)

    def _info(self, span: Span | None) -> PeerInfo:
        peer, addresses = self._state.node_key().peer, self._inner.addresses
        return stage_info(self._source, self._stored.dtype, self._shape, peer=peer, addresses=addresses, span=span)

    async def _remember_forever(self) -> None:
        while True:
            self._remember()
            await trio.sleep(_REMEMBER_S)

    def _remember(self) -> None:
        registry = self._membership.registry
        self._state.remember(Known(records=registry.records, revocations=registry.revocations))


def member_statuses(membership: Membership, transport: Libp2pTransport) -> list[MemberStatus]:
    """Return what a node says of its swarm's members."""
    connected = membership.links.connected
    return [
        MemberStatus(
            peer=member.peer,
            state=member.record.state,
            is_alive=member.is_alive,
            role=member.record.grants[-1].role,
            span=str(member.record.info.span or ""),
            addresses=list(member.record.info.addresses),
            round_trip_s=member.round_trip_s,
            is_relayed=member.peer in connected and transport.is_relayed(member.peer),
            num_sessions=member.num_sessions,
            cache_bytes=member.cache_bytes,
            max_layers=member.record.profile.max_layers,
            layer_s=member.record.profile.layer_us / 1e6,
            version=member.record.version,
            age_s=max(0.0, time.time() - member.record.incarnation / 1e3),
        )
        for member in membership.registry.members()
    ]


def _recall(registry: Registry, known: Known) -> None:
    """Take in what was known before the restart; what has expired since is left out."""
    for revocation in known.revocations:
        registry.revoke(revocation)
    for record in known.records:
        try:
            registry.merge(record, time.time())
        except DsdError as exc:
            logger.info("remembered record refused peer=%s error=%s", record.info.peer, exc)


def _drafter(name: str) -> Drafter | None:
    """What a node coordinates with."""
    match name:
        case "none":
            return None
        case "ngram":
            return NgramDrafter()
        case other:
            raise ConfigError(f"draft {other!r}: a node coordinates with ngram, or with none")


def _coordinating_policy() -> WindowPolicy:
    return learned_policy(frozenset({Mode.CONTINUOUS}))
