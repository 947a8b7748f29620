"""Runs a swarm of signing stages in this process, each layer at several peers, any of which can be told to lie."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from dsd_p2p.coordination.directory import StageList
from dsd_p2p.coordination.engine import Engine
from dsd_p2p.drafting.base import Drafter
from dsd_p2p.keys import SigningKey
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.describe import stage_info
from dsd_p2p.models.source import ModelSource
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.memory import MemoryNetwork, MemoryTransport
from dsd_p2p.types import PeerId, PeerInfo, Span
from dsd_p2p.wire.codec import decode, encode
from node.lab.audited.lies import Switch


class Roots(StageList):
    """A list of stages, some of which came with the same invite. same: the invite of those."""

    def __init__(self, links: PeerLinks) -> None:
        super().__init__(links)
        self.same: Mapping[str, str] = {}

    def root_of(self, peer: str) -> str:
        """Return the invite that a peer came with."""
        return self.same.get(peer) or super().root_of(peer)


@dataclass(slots=True)
class Stage:
    """One peer of the swarm."""

    key: SigningKey
    span: Span
    model: Switch
    transport: MemoryTransport


@dataclass(slots=True)
class AuditedSwarm:
    """A running swarm. stages: of the first replica of each span, then of the second, and so on."""

    engine: Engine
    directory: Roots
    stages: list[Stage]

    def honest(self) -> None:
        """Let everybody be honest again, and forget who was caught."""
        for stage in self.stages:
            stage.model.lie = None
        self.directory.same = {}
        self.engine.trust.distrusted.clear()


@asynccontextmanager
async def audited_swarm(
    source: ModelSource,
    spans: Sequence[Span],
    drafter: Drafter,
    *,
    dtype: str = "float32",
    num_replicas: int = 3,
    copies: Mapping[str, ModelSource] | None = None,
) -> AsyncIterator[AuditedSwarm]:
    """Serve `num_replicas` of each span until the end of the block.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    network, shape = MemoryNetwork(), read_shape(source.folder)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        stages = []
        for number in range(num_replicas * len(spans)):
            key, span = SigningKey(number.to_bytes(32, "little")), spans[number % len(spans)]
            transport = await stack.enter_async_context(network.open(key.peer))
            stage = Stage(key, span, Switch(source, span, dtype, dict(copies or {})), transport)
            _let_lie(stage)
            me = stage_info(source, dtype, shape, peer=transport.peer, addresses=transport.addresses, span=span)
            links = PeerLinks(transport, me)
            server = StageServer(links, stage.model, StageLimits(), time.perf_counter, sign=key.sign)
            nursery.start_soon(run_services, links, [server])
            stages.append(stage)
        mine = await stack.enter_async_context(network.open(SigningKey(b"coordinator".ljust(32)).peer))
        links = PeerLinks(mine, PeerInfo(peer=mine.peer, addresses=mine.addresses))
        directory = Roots(links)
        engine = Engine(links, drafter, shape.vocab_size, nursery, directory)
        nursery.start_soon(run_services, links, [engine])
        await directory.add([f"memory:{stage.key.peer}" for stage in stages])
        yield AuditedSwarm(engine, directory, stages)


def _let_lie(stage: Stage) -> None:
    """Let the stage's lie change what the stage sends."""
    send = stage.transport.send

    async def lying(to: PeerId, frame: bytes) -> None:
        lie = stage.model.lie
        if lie is not None and lie.sends is not None:
            message, payload = decode(frame)
            if (changed := lie.sends(message)) is None:
                return
            frame = encode(changed, payload)
        await send(to, frame)

    stage.transport.send = lying  # type: ignore[method-assign]
