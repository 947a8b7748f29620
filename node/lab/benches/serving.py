"""Provides the stages, the prompts and the simultaneous answers for the benchmarks of serving."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions, open_engine
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import Span, TextRequest, TokenId
from dsd_p2p.window.base import WindowPolicy
from node.lab.config import UsersConfig

_PROMPT_TOKENS = 24


@dataclass(slots=True)
class Run:
    """One repetition of an arm: several requests at once."""

    tokens: dict[int, list[TokenId]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The tokens a second of all requests together."""
        return sum(map(len, self.tokens.values())) / self.wall_s

    @property
    def fairness(self) -> float:
        """The speed of the slowest request over that of the fastest."""
        rates = [len(self.tokens[index]) / self.seconds[index] for index in self.tokens]
        return min(rates) / max(rates)


@asynccontextmanager
async def serving_swarm(
    config: UsersConfig, source: ModelSource, num_layers: int, vocab_size: int, progress: Progress
) -> AsyncIterator[Engine]:
    """Serve a model as `config` says until the end of the block. Yield the engine that coordinates.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
    drafter = DrafterChoice(
        config.draft, source, model=config.model, dtype=config.draft_dtype, device=config.device, progress=progress
    )
    drafter.load()
    if config.in_process:
        from node.lab.benches.in_process import in_process_swarm

        async with in_process_swarm(config, source, spans, drafter) as (engine, _):
            yield engine
        return
    # Imported only here: a swarm in one process needs no network.
    from dsd_p2p.transport.ephemeral import open_ephemeral
    from node.local.local_swarm import local_swarm, stage_processes

    async with (
        local_swarm(stage_processes(config, spans), progress) as nodes,
        open_ephemeral(config.link_model()) as transport,
        open_engine(transport, drafter, vocab_size) as (engine, stages),
    ):
        await stages.add([node.address for node in nodes])
        yield engine


async def write_together(
    engine: Engine, config: UsersConfig, prompts: Sequence[Sequence[TokenId]], policy: Callable[[], WindowPolicy]
) -> Run:
    """Write one answer to each prompt, all at the same time."""
    run = Run()
    options = GenerateOptions(text=TextRequest(max_tokens=config.max_tokens))

    async def write(index: int) -> None:
        start_s = trio.current_time()
        async with engine.generate(prompts[index], options, policy()) as generation:
            tokens: list[TokenId] = []
            times: list[float] = []
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    tokens += piece.tokens
                    times.append(trio.current_time())
        run.tokens[index], run.seconds[index] = tokens, trio.current_time() - start_s
        run.gaps_s += [after - before for before, after in pairwise(times)]

    start_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(write, index)
    run.wall_s = trio.current_time() - start_s
    return run


def random_prompts(vocab_size: int, count: int) -> list[list[TokenId]]:
    """Return prompts of random tokens. They need not make sense here, and so the model needs no tokenizer."""
    rng = random.Random(0)  # noqa: S311 - reproducible
    return [rng.choices(range(vocab_size), k=_PROMPT_TOKENS + index) for index in range(count)]
