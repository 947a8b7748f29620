"""Implements `dsd bench audits`: which lies an audit catches in short answers, and whether it accuses honest stages."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import trio

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import PeerError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import Sampling, Span, TextRequest, TokenId
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree
from node.lab.audited.lies import LIES, changed_copies
from node.lab.audited.swarm import AuditedSwarm, audited_swarm
from node.lab.config import AuditsConfig
from node.lab.receipt import print_table

_QUESTIONS = (
    "Describe a lighthouse in winter.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Name three rivers of Europe and a city at each.",
)
_POLICIES = (
    PLAIN,
    continuous_tree(depth=8, width=1, window_nodes=4, max_in_flight=3),
    continuous_tree(depth=8, width=2, window_nodes=6, max_in_flight=2),
)


@dataclass(slots=True)
class _Outcome:
    caught: dict[str, bool] = field(default_factory=dict)
    """For each lie, whether the liar was named or its route was left before its result counted."""
    honest: int = 0
    accused: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)


async def run_audits(config: AuditsConfig, progress: Progress) -> dict[str, object]:
    """Let one stage lie in each way, then write honest answers with changing windows and numbers of threads.

    Raises:
        ModelError: the model cannot be loaded.
    """
    source = find_model(config.model, progress)
    text = TextCodec(source.folder)
    prompts = [text.encode(question, is_raw=False) for question in _QUESTIONS]
    spans = [Span(*span) for span in even_spans(read_shape(source.folder).num_layers, config.stages)]
    outcomes = {}
    with changed_copies(source) as copies:
        for dtype in ("float32", "bfloat16"):
            outcomes[dtype] = _Outcome()
            async with audited_swarm(source, spans, NgramDrafter(), dtype=dtype, copies=copies) as swarm:
                await _lie(swarm, prompts, config, outcomes[dtype])
                await _be_honest(swarm, prompts, config, outcomes[dtype])
    rows = [
        (dtype, f"{sum(each.caught.values())} of {len(each.caught)}", f"{len(each.accused)} of {each.honest}")
        for dtype, each in outcomes.items()
    ]
    print_table(("weights", "lies caught", "honest answers accused"), rows)
    return {
        "model": config.model,
        "spans": [str(span) for span in spans],
        "max_tokens": config.max_tokens,
        "outcomes": {
            dtype: {
                "lies": each.caught,
                "honest": each.honest,
                "accused": each.accused,
                "unfinished": each.unfinished,
            }
            for dtype, each in outcomes.items()
        },
    }


async def _lie(swarm: AuditedSwarm, prompts: Sequence[list[TokenId]], config: AuditsConfig, outcome: _Outcome) -> None:
    torch.set_num_threads(config.threads)
    for number, lie in enumerate(LIES):
        liar = swarm.stages[config.stages - 1 if lie.needs_tail else config.stages // 2]
        liar.model.lie = lie
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=number) if lie.is_sampled else Sampling()
        error = await _write(swarm, prompts[number % len(prompts)], config.max_tokens, sampling, 1)
        was_left = error is None and lie.sends is not None
        outcome.caught[lie.name] = was_left or liar.key.peer in swarm.engine.trust.distrusted
        swarm.honest()


async def _be_honest(
    swarm: AuditedSwarm, prompts: Sequence[list[TokenId]], config: AuditsConfig, outcome: _Outcome
) -> None:
    rng = random.Random(config.seed)  # noqa: S311 - which answer is asked for
    for number in range(config.honest):
        # The passes of one answer, and the checks of the next, run with other numbers of threads.
        torch.set_num_threads(rng.choice((1, 2)))
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=number) if rng.random() < 0.5 else Sampling()
        policy = rng.randrange(len(_POLICIES))
        error = await _write(swarm, rng.choice(prompts), config.max_tokens, sampling, policy)
        outcome.honest += 1
        if swarm.engine.trust.distrusted:
            outcome.accused.append(str(error))
            swarm.honest()
        elif error is not None:
            outcome.unfinished.append(str(error))


async def _write(
    swarm: AuditedSwarm, prompt: list[TokenId], max_tokens: int, sampling: Sampling, policy: int
) -> PeerError | None:
    options = GenerateOptions(text=TextRequest(max_tokens=max_tokens, sampling=sampling), audit=True)
    try:
        async with swarm.engine.generate(prompt, options, StaticPolicy(_POLICIES[policy])) as generation:
            with trio.fail_after(300):
                async for _ in generation:
                    pass
    except PeerError as exc:
        return exc
    return None
