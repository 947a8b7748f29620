"""Runs a swarm in one process with all stages on one device.

It is for a GPU: stages in separate processes would only take turns on it.
"""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from dsd_p2p import units
from dsd_p2p.coordination.engine import Engine, open_engine
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.models.describe import stage_info
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.peers.services import run_services
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.base import Transport
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import PeerInfo, Span
from node.lab.config import UsersConfig


@asynccontextmanager
async def in_process_swarm(
    config: UsersConfig, source: ModelSource, spans: list[Span], drafter: DrafterChoice
) -> AsyncIterator[tuple[Engine, list[StageServer]]]:
    """Load the spans and serve them until the end of the block.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    network = MemoryNetwork()
    num_all = 4 * config.sessions
    limits = StageLimits(sessions=Scopes(what="sessions", node=num_all, root=num_all, peer=num_all))
    cache_bytes = units.num_bytes(config.cache_memory)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        servers = []
        for index, span in enumerate(spans):
            model = open_span(source, span, dtype=config.dtype, device=config.device, cache_bytes=cache_bytes)
            transport = await stack.enter_async_context(network.open(f"stage{index}"))
            links = PeerLinks(transport, _info(config, source, span, transport, model))
            servers.append(StageServer(links, model, limits, time.perf_counter))
            nursery.start_soon(run_services, links, [servers[-1]])
        mine = await stack.enter_async_context(network.open("coordinator"))
        engine, stages = await stack.enter_async_context(open_engine(mine, drafter, model.shape.vocab_size))
        await stages.add([f"memory:stage{index}" for index in range(len(spans))])
        yield engine, servers


def _info(config: UsersConfig, source: ModelSource, span: Span, transport: Transport, model: OpenSpan) -> PeerInfo:
    peer, addresses = transport.peer, transport.addresses
    return stage_info(source, config.dtype, model.shape, peer=peer, addresses=addresses, span=span)
