"""Opens a coordinator in a swarm, for `dsd generate --swarm` and other commands."""

import random
import secrets
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import trio

from dsd_p2p.coordination.draft_places import DraftPlaces
from dsd_p2p.coordination.engine import Engine
from dsd_p2p.coordination.for_others import ThinClient
from dsd_p2p.coordination.hints import SharedExperience
from dsd_p2p.coordination.own_drafter import OwnDrafter
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.errors import DsdError, PeerDisconnected
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.source import ModelSource
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.peers.gatekeeper import SwarmGatekeeper
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.membership import Membership, MembershipSettings, open_membership
from dsd_p2p.peers.rekeying import Rekeying
from dsd_p2p.peers.services import run_services
from dsd_p2p.placement.coordinator import choose_coordinator, speculation_of
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import Libp2pTransport, open_libp2p
from dsd_p2p.types import PeerId, PeerInfo
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.membership import MemberState
from dsd_p2p.wire.version import PROTOCOL_ID
from node.member.control import PeerReport, Status, ask_node
from node.member.reachable import reachable_addresses
from node.member.state import SwarmState

SWARM_RETRY = RetryPolicy(max_attempts=8, first_delay_s=0.1, max_delay_s=2.0)
"""Several peers may leave at once, and the news takes one or two heartbeats: about five seconds of attempts in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmClient:
    """A member that serves no layers. thin: asks other peers to coordinate."""

    engine: Engine
    thin: ThinClient
    membership: Membership
    directory: SwarmDirectory
    transport: Libp2pTransport


@asynccontextmanager
async def open_swarm_client(
    state: SwarmState,
    source: ModelSource,
    drafter: Drafter | DrafterChoice,
    *,
    link: LinkModel | None = None,
    heartbeat_s: float = 1.0,
    listen: str = "/ip4/0.0.0.0/tcp/0",
    coverage_timeout_s: float = 30.0,
    meet_timeout_s: float = 20.0,
) -> AsyncIterator[SwarmClient]:
    """Join the swarm until the end of the block. Yields once at least one other member is reached.

    Raises:
        PeerDisconnected: no member can be reached, or we are refused; the text says why.
    """
    stored = state.membership()
    shape = read_shape(source.folder)
    rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of links and retries
    with state.client() as (identity, grants):
        async with (
            open_libp2p(
                identity=identity,
                listen=listen,
                protocol=PROTOCOL_ID,
                max_frame_bytes=MAX_FRAME_BYTES,
                network_key=stored.network_key,
            ) as inner,
            emulate(inner, link or LinkModel(), rng) as transport,
            trio.open_nursery() as nursery,
        ):
            inner.addresses = reachable_addresses(inner.addresses, "")
            registry = Registry(me=inner.peer, swarm=stored.swarm, interval_s=heartbeat_s)
            gatekeeper = SwarmGatekeeper(registry, grants, time.time)
            me = PeerInfo(peer=inner.peer, addresses=inner.addresses)
            links = PeerLinks(transport, me, gatekeeper)
            bootstrap = await _bootstrap(state)
            settings = MembershipSettings(bootstrap=bootstrap, unix=time.time, rng=rng, version=version("dsd-p2p"))
            membership = open_membership(links, gatekeeper, state.key_of(identity), settings)
            directory = SwarmDirectory(
                membership,
                model=source.key(stored.dtype),
                num_layers=shape.num_layers,
                max_positions=shape.max_positions,
                coverage_timeout_s=coverage_timeout_s,
            )
            engine = Engine(links, drafter, shape.vocab_size, nursery, directory, can_cut_texts=not shape.is_recurrent)
            engine.own_drafter.grammars = ModelGrammars(source.folder, shape.vocab_size)
            engine.experience = SharedExperience(state.experience, links, directory.hint_givers)
            if engine.drafter is not LOOKUP:
                engine.places = DraftPlaces(directory.draft_offers)
            thin = ThinClient(links, partial(next_coordinator, directory, inner.peer), shape.vocab_size)
            rekeying = Rekeying(membership, stored.key_made_at_ms, state.change_network_key)
            nursery.start_soon(run_services, links, [membership, rekeying, engine, engine.experience, thin])
            await membership.announce(me, MemberState.SERVING)
            await _meet(membership, meet_timeout_s)
            yield SwarmClient(engine=engine, thin=thin, membership=membership, directory=directory, transport=inner)
            await membership.leave()
            nursery.cancel_scope.cancel()


def better_coordinator(directory: SwarmDirectory, me: PeerId, own_drafter: OwnDrafter | None) -> PeerId | None:
    """Return the peer that should coordinate a request now, or None for this one.

    own_drafter: None: we do not coordinate.
    """
    own = {} if own_drafter is None else {me: speculation_of(own_drafter.current.name, own_drafter.step_s)}
    chosen = choose_coordinator(directory.view(), me, directory.coordinators() | own)
    return None if chosen is None or chosen[0] == me else chosen[0]


def next_coordinator(directory: SwarmDirectory, me: PeerId, avoid: Collection[str]) -> PeerId | None:
    """Return the peer that a thin client should ask, or None when there is none. avoid: peers to leave out."""
    chosen = choose_coordinator(directory.view(), me, directory.coordinators(), avoid)
    return chosen[0] if chosen else None


async def _meet(membership: Membership, timeout_s: float) -> None:
    """Wait until we hear from another member.

    Raises:
        PeerDisconnected: we heard from none in time.
    """
    registry = membership.registry
    with trio.move_on_after(timeout_s):
        while sum(member.is_alive for member in registry.members()) < 2:
            with trio.move_on_after(registry.interval_s):
                await membership.changed()
        return
    raise PeerDisconnected(
        f"no member of the swarm was reached within {timeout_s:g} s: {membership.dialer.last_failure or 'nobody answers'}; "
        "see `dsd doctor`"
    )


async def _bootstrap(state: SwarmState) -> list[str]:
    """Return addresses to connect to first.

    They are those of this machine's node daemon and of the members it reaches. Without a daemon, they are those of
    remembered members and of the invite.
    """
    try:
        status = await ask_node(state.control_socket, Status(), timeout_s=2)
        assert isinstance(status, PeerReport)
    except DsdError:
        records = [record for record in state.known().records if record.profile.max_layers and record.info.addresses]
        return list(dict.fromkeys([*(r.info.addresses[0] for r in records[:8]), *state.membership().bootstrap]))
    others = [
        member.addresses[0] for member in status.members if member.is_alive and member.addresses and member.max_layers
    ]
    return list(dict.fromkeys([*status.addresses[-1:], *others]))
