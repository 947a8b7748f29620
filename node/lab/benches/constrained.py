"""Implements `dsd bench constrained`: answers that schemas constrain, over modes and splits, and what that costs."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import jsonschema_rs
import msgspec
import torch

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Constraint, ConstraintKind, Sampling, TextRequest, TokenId
from dsd_p2p.window.base import WindowPolicy
from dsd_p2p.window.named import adaptive_policy
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain
from node.lab.benches.serving import serving_swarm
from node.lab.config import ConstrainedConfig
from node.lab.quality.schemas import Schema, make_schemas
from node.lab.receipt import print_table, sample

_PROMPTS = (
    "Write an example.",
    "Invent an entry about a ship.",
    "Fill in the form for a small shop.",
    "Describe something that you like.",
    "Make up a record from the year 1850.",
)
_SPLITS: tuple[tuple[int, str, Callable[[], WindowPolicy]], ...] = (
    (1, "plain", lambda: StaticPolicy(PLAIN)),
    (2, "sync", lambda: StaticPolicy(sync_chain(4))),
    (3, "continuous", lambda: StaticPolicy(continuous_tree(depth=8, width=3, window_nodes=6, max_in_flight=4))),
)
_TIMED = 6
"""Schemas whose answers are timed; each takes some seconds over a slow link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    schema: Schema
    prompt: list[TokenId]
    sampling: Sampling


async def run_constrained(config: ConstrainedConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Write answers within schemas, plainly in one piece and speculating over splits; then time them on a slow link.

    Raises:
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    codec, vocab_size = TextCodec(source.folder), read_shape(source.folder).vocab_size
    cases = [
        _Case(
            schema=schema,
            prompt=codec.encode(f"{prompt} Answer in JSON.", is_raw=False),
            sampling=Sampling() if (number + index) % 2 else Sampling(temperature=0.8, seed=number),
        )
        for number, schema in enumerate(make_schemas(config.limit))
        for index, prompt in enumerate(_PROMPTS[: config.prompts])
    ]
    texts: list[list[list[TokenId]]] = [[] for _ in cases]
    for stages, name, policy in _SPLITS:
        here = msgspec.structs.replace(config, stages=stages, link="0ms")
        async with _swarm(here, source, vocab_size, progress) as engine:
            for number, case in enumerate(cases):
                progress.step(f"answers, {name}, {stages} stages", number, len(cases))
                tokens, _ = await _write(engine, config, codec, case, policy(), is_constrained=True)
                texts[number].append(tokens)
    judged = [_judge(case, found[0], codec, config.max_tokens) for case, found in zip(cases, texts, strict=True)]
    num_identical = sum(all(each == found[0] for each in found) for found in texts)
    results: dict[str, object] = {
        "model": config.model,
        "weights": config.dtype,
        "cases": len(cases),
        "complete": judged.count("valid") + judged.count("invalid"),
        "valid": judged.count("valid"),
        "cut": judged.count("cut"),
        "identical": num_identical,
        "invalid_schemas": [case.schema for case, each in zip(cases, judged, strict=True) if each == "invalid"],
    }
    results |= await _time(config, source, codec, vocab_size, cases[:: config.prompts][:_TIMED], rounds, progress)
    print_table(
        ("answers", "complete", "valid", "cut", "the same in all modes"),
        [tuple(str(results[key]) for key in ("cases", "complete", "valid", "cut", "identical"))],
    )
    return results


def _swarm(
    config: ConstrainedConfig, source: ModelSource, vocab_size: int, progress: Progress
) -> AbstractAsyncContextManager[Engine]:
    return serving_swarm(config, source, read_shape(source.folder).num_layers, vocab_size, progress)


def _judge(case: _Case, tokens: Sequence[TokenId], codec: TextCodec, max_tokens: int) -> str:
    """Return whether an answer is valid JSON of its schema; one that used up its tokens is cut off."""
    if tokens[-1] not in codec.stop_tokens:
        assert len(tokens) == max_tokens, "an answer ends with a stop token or at its limit"
        return "cut"
    try:
        jsonschema_rs.validator_for(case.schema, validate_formats=True).validate(json.loads(codec.decode(tokens)))
    except (ValueError, jsonschema_rs.ValidationError):
        return "invalid"
    return "valid"


async def _write(
    engine: Engine,
    config: ConstrainedConfig,
    codec: TextCodec,
    case: _Case,
    policy: WindowPolicy,
    *,
    is_constrained: bool,
) -> tuple[list[TokenId], float]:
    """Return an answer, and its tokens a second after the first arrival."""
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(case.schema)) if is_constrained else None
    text = TextRequest(
        max_tokens=config.max_tokens, sampling=case.sampling, stop_tokens=codec.stop_tokens, constraint=constraint
    )
    async with engine.generate(case.prompt, GenerateOptions(text=text), policy) as generation:
        tokens = [token async for token in generation]
    return tokens, generation.timing.tokens_per_s


async def _time(
    config: ConstrainedConfig,
    source: ModelSource,
    codec: TextCodec,
    vocab_size: int,
    cases: Sequence[_Case],
    rounds: int,
    progress: Progress,
) -> dict[str, object]:
    """Return the tokens a second on the configured link: constrained plainly, with guided drafts and without, and free."""
    arms: dict[str, list[float]] = {"plain": [], "guided": [], "unguided": [], "unconstrained": []}
    async with _swarm(config, source, vocab_size, progress) as engine:
        grammars = ModelGrammars(source.folder, vocab_size)
        for number in range(rounds):
            progress.step(f"times at {config.link}", number, rounds)
            for case in cases:
                for name, speeds in arms.items():
                    engine.own_drafter.grammars = grammars if name == "guided" else None
                    policy = StaticPolicy(PLAIN) if name == "plain" else adaptive_policy("learned")
                    _, speed = await _write(engine, config, codec, case, policy, is_constrained=name != "unconstrained")
                    speeds.append(speed)
    print_table(
        (f"tokens/s, {config.stages} stages, {config.link}", *arms),
        [("median", *(f"{sample(speeds).median:.1f}" for speeds in arms.values()))],
    )
    medians = {name: sample(speeds).median for name, speeds in arms.items()}
    return {
        "link": config.link,
        "stages": config.stages,
        "tokens_per_s": {name: sample(speeds) for name, speeds in arms.items()},
        "guided_ratio": medians["guided"] / medians["plain"],
        "guided_over_unconstrained": medians["guided"] / medians["unconstrained"],
    }
