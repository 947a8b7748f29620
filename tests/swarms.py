"""Swarms for tests: stages in this process over the memory transport."""

import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio
import trio.testing

from dsd_p2p.coordination.engine import Engine, GenerateOptions, open_engine
from dsd_p2p.coordination.generation import Generation
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.models.open import open_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import SpanModel
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.memory import MemoryNetwork, MemoryTransport
from dsd_p2p.types import ComputeFormat, ModelKey, PeerInfo, Sampling, Span, TextRequest
from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import StaticPolicy
from dsd_p2p.wire.messages import OpenSession
from dsd_p2p.wire.opening import signed_opening

NO_LINK = LinkModel()


def load_stages(source: ModelSource, num_stages: int, **options: object) -> list[SpanModel]:
    from dsd_p2p.models.architecture import read_model_config

    num_layers = read_model_config(source.folder).num_hidden_layers
    return [open_span(source, Span(*bounds), **options) for bounds in even_spans(num_layers, num_stages)]


TEST_MODEL = ModelKey(digest="digest", weights="float32", compute=ComputeFormat.FLOAT32)


class MemorySwarm:
    """A running swarm: its network, its servers, its engine."""

    def __init__(self, network: MemoryNetwork, servers: list[StageServer], engine: Engine) -> None:
        self.network = network
        self.servers = servers
        self.engine = engine

    async def write(
        self, prompt: Sequence[int], num_tokens: int, decision: Decision, sampling: Sampling | None = None
    ) -> tuple[list[int], Generation]:
        options = GenerateOptions(text=TextRequest(max_tokens=num_tokens, sampling=sampling or Sampling()))
        with trio.fail_after(120):
            async with self.engine.generate(prompt, options, StaticPolicy(decision)) as generation:
                tokens = [token async for token in generation]
        return tokens, generation

    async def all_closed(self) -> None:
        """Wait until no stage holds a session."""
        with trio.fail_after(10):
            while any(server.num_sessions for server in self.servers):
                await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def memory_swarm(
    stages: Sequence[object],
    drafter: Drafter,
    *,
    vocab_size: int,
    num_layers: int,
    spans: Sequence[Span],
    link: LinkModel = NO_LINK,
    network: MemoryNetwork | None = None,
    limits: StageLimits | None = None,
    max_positions: int = 1024,
) -> AsyncIterator[MemorySwarm]:
    network = network or MemoryNetwork()
    rng = random.Random(0)
    servers: list[StageServer] = []

    async def serve(index: int, transport: MemoryTransport, task_status: trio.TaskStatus) -> None:
        async with emulate(transport, link, rng) as linked:
            me = PeerInfo(
                peer=linked.peer,
                addresses=linked.addresses,
                span=spans[index],
                num_layers=num_layers,
                model_name="test",
                model=TEST_MODEL,
                max_positions=max_positions,
            )
            server = StageServer(PeerLinks(linked, me), stages[index], limits or StageLimits(), time.perf_counter)
            servers.append(server)
            task_status.started()
            await run_services(server.links, [server])

    async with trio.open_nursery() as nursery:
        async with network.open("coordinator") as mine, emulate(mine, link, rng) as linked_mine:
            transports = []
            for index in range(len(stages)):
                manager = network.open(f"stage{index}")
                transports.append(manager)
                await nursery.start(serve, index, await manager.__aenter__())
            async with open_engine(linked_mine, drafter, vocab_size) as (engine, listed):
                await listed.add([f"memory:stage{index}" for index in range(len(stages))])
                yield MemorySwarm(network, servers, engine)
            for manager in transports:
                await manager.__aexit__(None, None, None)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def model_swarm(
    models: Sequence[SpanModel], drafter: Drafter, link: LinkModel = NO_LINK, limits: StageLimits | None = None
) -> AsyncIterator[MemorySwarm]:
    shape = models[0].shape
    async with memory_swarm(
        models,
        drafter,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        spans=[model.span for model in models],
        link=link,
        limits=limits,
        max_positions=shape.max_positions,
    ) as swarm:
        yield swarm


def signed(opened: OpenSession, by: str | None = None) -> OpenSession:
    """Sign an opening as `by` would; by default as the coordinator that it names."""
    signature = MemoryTransport(MemoryNetwork(), by or opened.coordinator.peer).sign(signed_opening(opened))
    return msgspec.structs.replace(opened, signature=signature)
