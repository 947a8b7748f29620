"""Runs one peer of a swarm: it joins, serves the layers that help most, and drains before it leaves.

How it works. `SwarmPeer.run` opens the transport, makes the parts (`.parts`) and serves until it is stopped. It nests
two scopes. The inner one holds everything that serves. The outer one holds the control socket and the signal handler,
which must still respond while the inner one drains. `.placed` decides which layers to serve, `.status` reports on the
peer, and `.gateway` serves HTTP and telemetry.
"""

import logging
import random
import secrets
import signal
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from importlib.metadata import version

import trio

from dsd_p2p import units
from dsd_p2p.coordination.draft_places import DraftPlaces
from dsd_p2p.coordination.draft_service import DraftService
from dsd_p2p.coordination.engine import Engine
from dsd_p2p.coordination.for_others import CoordinatorService, ThinClient
from dsd_p2p.coordination.hints import SharedExperience
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.errors import ConfigError, DsdError, PeerDisconnected
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.peers.gatekeeper import SwarmGatekeeper
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.membership import MembershipSettings, open_membership
from dsd_p2p.peers.rekeying import Rekeying
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.peers.services import Service, run_services
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.swarm.admission import Admission
from dsd_p2p.swarm.grants import check_grants
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.transport.base import Transport
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import Libp2pTransport, open_libp2p
from dsd_p2p.window.base import Mode, WindowPolicy
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.membership import MemberState, OwnerChoice
from dsd_p2p.wire.version import PROTOCOL_ID
from node.config import ServeFlags
from node.gateway.setup import read_clients
from node.local.events import GatewayOpen, Loading
from node.member.client import next_coordinator
from node.member.control import Answer, Ask, Choose, Done, NewKey, Revoke, Status, Stop, serve_control
from node.member.drafts import MemberDrafts
from node.member.gateway import serve_peer_gateway, swarm_topics, telling
from node.member.lan import neighbours
from node.member.parts import PeerParts
from node.member.placed import Placed
from node.member.reachable import reachable_addresses
from node.member.settings import PeerSettings
from node.member.state import Known
from node.member.status import node_status
from node.watch.hub import EventHub
from node.watch.outlets import broker_of, check_collector

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 20.0
_CHECK_S = 0.1
_SETTLE_BEATS = 2.5
"""Heartbeats to wait for before choosing layers: by then every member has been heard."""

_REMEMBER_S = 10.0
_DRAIN_S = 10.0


class SwarmPeer:
    """A peer of a swarm; `run` joins and serves until stopped.

    Raises:
        ConfigError: the file of API keys is invalid.
    """

    def __init__(self, settings: PeerSettings) -> None:
        self._settings = settings
        self._clients = read_clients(settings.gateway)
        self._hub = EventHub()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Join and serve until told to stop.

        Raises:
            ConfigError, ModelError: the peer cannot start as configured.
            RemoteProtocolError: our grants have expired or are invalid.
            PeerDisconnected: the swarm refuses us, or nobody answers.
        """
        settings, config, stored = self._settings, self._settings.config, self._settings.stored
        if not 0.05 <= units.seconds(config.heartbeat) <= 10:
            raise ConfigError(f"--heartbeat is {config.heartbeat}: expected 50ms to 10s")
        broker_of(config.mqtt, config.mqtt_ca, swarm_topics(stored))
        check_collector(config.otlp)
        check_grants(stored.grants, swarm=stored.swarm, peer=settings.state.node_key().peer, now_s=time.time())
        async with open_libp2p(
            identity=settings.state.identity,
            listen=config.listen,
            protocol=PROTOCOL_ID,
            max_frame_bytes=MAX_FRAME_BYTES,
            network_key=stored.network_key,
            is_relay=config.relay,
        ) as inner:
            inner.addresses = reachable_addresses(inner.addresses, config.announce)
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of links and retries
            async with emulate(inner, config.link_model(), rng) as transport, trio.open_nursery() as outer:
                with self._scope:
                    async with trio.open_nursery() as nursery:
                        parts = self._assemble(inner, transport, rng, nursery)
                        outer.start_soon(serve_control, settings.state.control_socket, partial(self._answer, parts))
                        outer.start_soon(self._stop_on_signal, parts)
                        async with self._neighbours(parts):
                            await self._serve(parts, nursery)
                outer.cancel_scope.cancel()

    def _assemble(
        self, inner: Libp2pTransport, transport: Transport, rng: random.Random, nursery: trio.Nursery
    ) -> PeerParts:
        settings, config, stored = self._settings, self._settings.config, self._settings.stored
        key, shape = settings.state.node_key(), settings.shape
        admission = Admission(stored.swarm, settings.state.note)
        admission.recall(settings.state.authority())
        registry = Registry(
            me=key.peer, swarm=stored.swarm, interval_s=units.seconds(config.heartbeat), admission=admission
        )
        _recall(registry, settings.state.known(), settings.state.choice())
        gatekeeper = SwarmGatekeeper(registry, stored.grants, time.time)
        links = PeerLinks(transport, settings.describe(None, inner.addresses), gatekeeper)
        server = StageServer(links, None, _limits(config), time.perf_counter, sign=key.sign)
        placed = Placed(settings, server)
        membership = open_membership(
            links,
            gatekeeper,
            key,
            MembershipSettings(bootstrap=stored.bootstrap, unix=time.time, rng=rng, version=version("dsd-p2p")),
            placed.load,
        )
        directory = SwarmDirectory(
            membership,
            model=settings.source.key(stored.dtype),
            num_layers=shape.num_layers,
            max_positions=shape.max_positions,
        )
        rekeying = Rekeying(membership, stored.key_made_at_ms, settings.state.change_network_key)
        thin = ThinClient(links, partial(next_coordinator, directory, inner.peer), shape.vocab_size)
        drafts = MemberDrafts(settings, registry)
        choice = drafts.choice()
        engine = None
        if choice is not None:
            engine = Engine(links, choice, shape.vocab_size, nursery, directory, can_cut_texts=not shape.is_recurrent)
        coordinating: list[Service] = []
        if engine is not None:
            engine.own_drafter.grammars = ModelGrammars(settings.source.folder, shape.vocab_size)
            engine.experience = SharedExperience(settings.state.experience, links, directory.hint_givers)
            engine.places = DraftPlaces(partial(drafts.offers, directory))
            drafting = DraftService(links, engine.own_drafter.open_for_peer, settings.source.key(stored.dtype))
            coordinating = [engine, drafting, engine.experience]
            if config.role == "stage":
                coordinating.append(CoordinatorService(engine, coordinating_policy))
        return PeerParts(
            settings=settings,
            shape=shape,
            transport=inner,
            membership=membership,
            rekeying=rekeying,
            directory=directory,
            server=server,
            placed=placed,
            engine=engine,
            thin=thin,
            drafts=drafts,
            services=(membership, rekeying, server, *coordinating, thin),
        )

    def _neighbours(self, parts: PeerParts) -> AbstractAsyncContextManager[None]:
        addresses = [address for address in parts.transport.addresses if "/ip4/127." not in address]
        if not self._settings.config.lan or not addresses:
            return nullcontext()
        return neighbours(
            network_key=self._settings.stored.network_key,
            peer=parts.membership.registry.me,
            addresses=addresses,
            found=parts.membership.dialer.also_try,
        )

    async def _serve(self, parts: PeerParts, nursery: trio.Nursery) -> None:
        membership, gateway = parts.membership, self._settings.gateway
        nursery.start_soon(run_services, membership.links, parts.services)
        if self._settings.config.through:
            parts.transport.be_reachable_through(self._settings.config.through)
        await self._join(parts)
        if self._settings.config.role == "stage":
            await parts.placed.take_first(membership, parts.directory)
        else:
            await parts.placed.serve_none(membership)
        nursery.start_soon(self._remember_forever, parts)
        nursery.start_soon(parts.placed.report_changes, membership)
        if parts.engine is not None:
            nursery.start_soon(parts.directory.plan_ahead)
            nursery.start_soon(parts.drafts.follow, parts.engine.own_drafter, membership, parts.placed)
            if gateway.port is not None or self._settings.config.role == "draft":
                parts.engine.own_drafter.want()
        async with telling(parts, self._hub):
            if gateway.port is not None:
                opened = partial(_report_url, self._settings)
                nursery.start_soon(
                    serve_peer_gateway, parts, gateway, self._clients, self._hub, coordinating_policy, opened
                )
            await parts.placed.keep(membership, parts.directory)

    async def _join(self, parts: PeerParts) -> None:
        """Connect to the swarm, unless we are its first peer or all other members are down.

        Raises:
            PeerDisconnected: the swarm refuses us, or nobody answers and we know no member from an earlier run.
        """
        settings, membership, links = self._settings, parts.membership, parts.membership.links
        settings.report(Loading(what="meet the swarm"))
        await membership.announce(links.me, MemberState.JOINING, settings.profile)
        others = [record for record in membership.registry.records if record.info.peer != links.me.peer]
        if not settings.stored.bootstrap and not others:
            return
        dialer = membership.dialer
        with trio.move_on_after(_JOIN_TIMEOUT_S):
            while not links.connected and not dialer.is_refused:
                with trio.move_on_after(_CHECK_S):
                    await membership.changed()
        # A peer that has met members before serves alone while they are down. A new or a refused peer does not.
        if not links.connected and (dialer.is_refused or not others):
            raise PeerDisconnected(f"cannot join the swarm: {dialer.last_failure or 'nobody answered'}")
        await trio.sleep(_SETTLE_BEATS * membership.registry.interval_s)

    # Stopping, and requests from commands

    async def _stop(self, parts: PeerParts, drain_s: float) -> None:
        await parts.placed.drain(parts.membership, drain_s)
        self._scope.cancel()

    async def _stop_on_signal(self, parts: PeerParts) -> None:
        """Drain at the first signal; stop at once at the second, without waiting for running sessions."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                async for _ in signals:
                    if parts.placed.state is MemberState.DRAINING:
                        self._scope.cancel()
                        return
                    nursery.start_soon(self._stop, parts, _DRAIN_S)

    async def _answer(self, parts: PeerParts, ask: Ask) -> Answer:
        match ask:
            case Status():
                return node_status(parts)
            case Stop(drain_s=drain_s):
                await self._stop(parts, drain_s)
                return Done()
            case Revoke(revocation=revocation):
                await parts.membership.revoke(revocation)
                self._remember(parts)
                return Done()
            case NewKey(rekey=rekey):
                await parts.rekeying.take(rekey)
                return Done()
            case Choose(choice=choice):
                await parts.membership.choose(choice)
                self._remember(parts)
                return Done()

    async def _remember_forever(self, parts: PeerParts) -> None:
        while True:
            self._remember(parts)
            await trio.sleep(_REMEMBER_S)

    def _remember(self, parts: PeerParts) -> None:
        registry = parts.membership.registry
        self._settings.state.remember(Known(records=registry.records, choice=registry.choice))


def _report_url(settings: PeerSettings, url: str) -> None:
    settings.report(GatewayOpen(url=url))


def _limits(config: ServeFlags) -> StageLimits:
    """Return the limits of a member's stage: nobody, and no invite, gets the last quarter of the cache."""
    num_bytes = units.num_bytes(config.cache_memory)
    most = num_bytes * 3 // 4
    return StageLimits(
        dials_routes=False, cache_bytes=Scopes(what="bytes of cache", node=num_bytes, root=most, peer=most)
    )


def _recall(registry: Registry, known: Known, choice: OwnerChoice | None) -> None:
    """Restore records and the owner's choice from before the restart, without records that have expired."""
    if choice is not None:
        registry.choose(choice, time.time())
    for record in known.records:
        try:
            registry.merge(record, time.time())
        except DsdError as exc:
            logger.info("remembered record refused peer=%s error=%s", record.info.peer, exc)


def coordinating_policy() -> WindowPolicy:
    """Return the policy of a request that this peer coordinates."""
    return adaptive_policy("learned", frozenset({Mode.CONTINUOUS}))
