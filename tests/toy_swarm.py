"""Shared by several tests."""

import random
from contextlib import asynccontextmanager

from swarms import memory_swarm
from toy import VOCAB
from toy_drafts import drafter
from toy_model import ToyDrafter, ToySpanModel

from dsd_p2p.netmodel import LinkModel
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import Span
from dsd_p2p.wire.codec import decode

PROMPT = [1, 2, 3, 4, 5]


NUM_STAGES = 3


SPANS = [Span(i, i + 1) for i in range(NUM_STAGES)]


class TappedNetwork(MemoryNetwork):
    """Notes every message: (from, to, message, payload bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str, object, int]] = []

    @asynccontextmanager
    async def open(self, name):
        async with super().open(name) as transport:
            original = transport.send

            async def send(to, frame):
                message, payload = decode(frame)
                self.log.append((name, str(to), message, len(payload)))
                await original(to, frame)

            transport.send = send
            yield transport


def toys(**options):
    return [ToySpanModel(span, NUM_STAGES, **options) for span in SPANS]


@asynccontextmanager
async def toy_swarm(*, accuracy=0.9, stages=None, network=None, link=None, limits=None, is_instant=True):
    async with memory_swarm(
        stages or toys(),
        ToyDrafter(drafter(accuracy, random.Random(0)), is_instant=is_instant),
        vocab_size=VOCAB,
        num_layers=NUM_STAGES,
        spans=SPANS,
        network=network or MemoryNetwork(),
        link=link or LinkModel(),
        limits=limits,
    ) as swarm:
        yield swarm
