"""Serves a swarm peer's gateway and sends its telemetry."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from dsd_p2p import units
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.text import TextCodec
from dsd_p2p.peers.membership import Membership
from dsd_p2p.telemetry.events import PeerStatus
from dsd_p2p.types import PeerId
from dsd_p2p.window.base import WindowPolicy
from node.config import GatewayConfig
from node.gateway.answering import Served
from node.gateway.backend import EngineBackend, SwarmBackend
from node.gateway.keys import Clients
from node.gateway.server import serve_gateway
from node.gateway.setup import default_sampling, make_gateway
from node.member.client import SWARM_RETRY, better_coordinator
from node.member.parts import PeerParts
from node.member.state import StoredMembership
from node.watch.hub import EventHub
from node.watch.outlets import broker_of, hearing, publishing, recording, tracing
from node.watch.status import StatusSource, report_forever


def swarm_topics(stored: StoredMembership) -> str:
    """Return the name of a swarm in its broker's topics."""
    return stored.swarm.hex()[:16]


@asynccontextmanager
async def telling(parts: PeerParts, hub: EventHub) -> AsyncIterator[None]:
    """Report the status of the peer and its requests, until the end of the block.

    Reports go to the hub and, where configured, to a broker, a trace collector and a recording.
    """
    me = parts.membership.links.me.peer
    broker = broker_of(parts.settings.config.mqtt, parts.settings.config.mqtt_ca, swarm_topics(parts.settings.stored))
    async with (
        publishing(broker, me) as publisher,
        hearing(broker, hub, me),
        tracing(parts.settings.config.otlp, me) as trace,
        AsyncExitStack() as stack,
        trio.open_nursery() as nursery,
    ):
        hub.pass_on_to(trace)
        hub.pass_on_to(stack.enter_context(recording(parts.settings.config.record)))
        if publisher is not None:
            hub.pass_on_to(publisher.tell)
        if parts.engine is not None:
            parts.engine.tell = hub.tell
        roles = ("stage", "coordinator") if parts.engine else ("stage",)
        source = StatusSource(
            links=parts.membership.links,
            roles=roles,
            server=parts.server,
            budget=parts.placed.budget,
            state=lambda: parts.placed.state,
            model=parts.settings.stored.model,
            num_dropped=lambda: publisher.num_dropped if publisher else 0,
        )
        nursery.start_soon(report_forever, source, hub.tell, partial(_hear_members, parts.membership, hub))
        yield
        nursery.cancel_scope.cancel()


def _hear_members(membership: Membership, hub: EventHub) -> None:
    """Report what heartbeats say about other members, except those that report themselves."""
    hub.tick()
    me = membership.links.me.peer
    for member in membership.registry.members():
        info, picture = member.record.info, hub.picture
        says_itself = member.peer in hub.speaking and not picture.is_silent(member.peer)
        if member.peer == me or says_itself:
            continue
        hub.hear(
            PeerStatus(
                at_s=time.time(),
                peer=member.peer,
                is_online=member.is_alive,
                roles=(member.record.grants[-1].role,),
                version=member.record.version,
                model=info.model_name,
                dtype=info.model.weights if info.model else "",
                first=info.span.first if info.span else 0,
                last=info.span.last if info.span else 0,
                num_layers=info.num_layers,
                state=member.record.state,
                num_sessions=member.num_sessions,
                cache_bytes=member.cache_bytes,
                links_s={} if member.round_trip_s is None else {me: member.round_trip_s},
            )
        )


async def serve_peer_gateway(
    parts: PeerParts,
    config: GatewayConfig,
    clients: Clients,
    hub: EventHub,
    make_policy: Callable[[], WindowPolicy],
    opened: Callable[[str], None],
) -> None:
    """Serve the gateway until cancelled. The best-placed coordinator handles each request.

    opened: called with the base URL.

    Raises:
        ConfigError: the port cannot be used.
    """
    assert config.port is not None, "a backend has a port"
    engine, source = parts.engine, parts.settings.source
    here = EngineBackend(engine, make_policy) if engine else None
    me = PeerId(parts.membership.links.me.peer)
    text = await trio.to_thread.run_sync(TextCodec, source.folder)
    choose = partial(better_coordinator, parts.directory, me, engine.own_drafter if engine else None)
    gateway = make_gateway(
        config,
        clients,
        SwarmBackend(here, parts.thin, choose, units.seconds(config.answer_timeout)),
        Served(
            name=parts.settings.stored.model,
            key=source.key(parts.settings.stored.dtype),
            max_positions=parts.shape.max_positions,
            vocab_size=parts.shape.vocab_size,
            text=text,
            sampling=default_sampling(config, text),
            grammars=ModelGrammars(source.folder, parts.shape.vocab_size),
        ),
        hub,
        is_ready=lambda: not parts.directory.view().uncovered(),
        retry=SWARM_RETRY,
    )
    async with trio.open_nursery() as nursery:
        opened(await nursery.start(serve_gateway, gateway, config.host, config.port, config.names))
