"""Implements `dsd bench relaxed --prompts chat`: what relaxed mode gains on MT-Bench, and what it does to the answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import msgspec
import torch
import trio

from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import GREEDY, Relaxation, TextRequest, TokenId
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import Verifier
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.window.static import StaticPolicy, sync_chain
from node.config.relaxation import Thresholds
from node.lab.benches.serving import serving_swarm
from node.lab.config import RelaxedConfig, UsersConfig
from node.lab.quality.pair_writer import PairWriter, Written
from node.lab.quality.prompts import load_turns, spread
from node.lab.receipt import print_table, sample

_CHAIN = 8
"""The window of arXiv:2511.11733."""

_NAMED = (
    "Compose an engaging travel blog post",
    "Imagine you are writing a blog post comparing",
    "Write a persuasive email to convince",
    "Describe a vivid and unique character",
)
"""How the prompts begin whose answers are timed. The last one was refused once a first token could be relaxed."""

_TIMED_TOKENS = 64
REFUSAL = re.compile(
    r"^\W*(i'm sorry|i am sorry|sorry|i apologi[sz]e|i can(no|')t|i am unable|i'm unable|as an ai\b)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One question. history: the messages before it."""

    name: str
    history: tuple[tuple[str, str], ...]
    question: str


class Judged(msgspec.Struct, kw_only=True):
    """Both answers to one question. loss: what the relaxed one costs by the target's likelihood, in nats a token."""

    name: str
    exact_tokens: int
    relaxed_tokens: int
    num_relaxed: int
    exact_accepted: float
    relaxed_accepted: float
    loss: float
    is_refusal: bool
    is_short: bool


def run_relaxed_chat(config: RelaxedConfig, thresholds: Thresholds, progress: Progress) -> dict[str, object]:
    """Answer both turns of MT-Bench's questions in both modes, compare the answers, and time some of them.

    Raises:
        ModelError: a model or the questions cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    codec = TextCodec(find_model(config.model, progress).folder)
    writer = PairWriter(config.model, config.draft, dtype=config.dtype, device=config.device, progress=progress)
    relaxation = thresholds.relaxation
    rules: dict[str, Verifier] = {
        "exact": ExactVerifier(GREEDY),
        "relaxed": AdaptiveVerifier(GREEDY, relaxation, codec.stop_tokens),
    }
    judged: list[Judged] = []
    questions = load_turns(progress)
    conversations = spread(questions, config.limit)
    histories: list[tuple[tuple[str, str], ...]] = [() for _ in conversations]
    for turn in range(2):
        asked = [
            _Turn(name=f"{name}-{turn + 1}", history=history, question=turns[turn])
            for (name, turns), history in zip(conversations, histories, strict=True)
        ]
        written = {mode: _answers(writer, codec, config, asked, rule, mode, progress) for mode, rule in rules.items()}
        judged += [_judge(codec, *each) for each in zip(asked, written["exact"], written["relaxed"], strict=True)]
        # Both modes go on from the exact answer, so that they answer the same question.
        histories = [
            (*each.history, ("user", each.question), ("assistant", codec.decode(text.tokens)))
            for each, text in zip(asked, written["exact"], strict=True)
        ]
    del writer
    speed = trio.run(_time, config, codec, relaxation, [turns[0] for _, turns in questions], progress)
    results: dict[str, object] = {
        "relaxation": msgspec.structs.asdict(relaxation),
        "speedup": speed["speedup"],
        "accepted_ratio": median(each.relaxed_accepted / each.exact_accepted for each in judged),
        "refusals": sum(each.is_refusal for each in judged),
        "short": sum(each.is_short for each in judged),
        "mean_loss": mean(each.loss for each in judged),
        "worst_loss": max(each.loss for each in judged),
        "relaxed_share": sum(each.num_relaxed for each in judged) / sum(each.relaxed_tokens for each in judged),
        "timed": speed["timed"],
        "answers": judged,
    }
    names = ("speedup", "accepted_ratio", "refusals", "short", "mean_loss", "worst_loss", "relaxed_share")
    print_table(
        (f"{len(judged)} answers", *names), [("relaxed over exact", *(f"{results[name]:.3g}" for name in names))]
    )
    return results


def _answers(
    writer: PairWriter,
    codec: TextCodec,
    config: RelaxedConfig,
    asked: Sequence[_Turn],
    rule: Verifier,
    mode: str,
    progress: Progress,
) -> list[Written]:
    prompts = [_encoded(codec, each) for each in asked]
    # Neighbours in length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts: dict[int, Written] = {}
    for start in range(0, len(order), config.batch):
        batch = order[start : start + config.batch]
        progress.step(f"{mode} answers", start, len(order))
        found = writer.write([prompts[index] for index in batch], config.max_tokens, codec.stop_tokens, rule)
        texts.update(zip(batch, found, strict=True))
    return [texts[index] for index in range(len(prompts))]


def _encoded(codec: TextCodec, turn: _Turn) -> list[TokenId]:
    said = [{"role": role, "content": text} for role, text in turn.history]
    return codec.encode_chat([*said, {"role": "user", "content": turn.question}])


def _judge(codec: TextCodec, turn: _Turn, exact: Written, relaxed: Written) -> Judged:
    refuses = [bool(REFUSAL.match(codec.decode(each.tokens))) for each in (exact, relaxed)]
    return Judged(
        name=turn.name,
        exact_tokens=len(exact.tokens),
        relaxed_tokens=len(relaxed.tokens),
        num_relaxed=relaxed.num_relaxed,
        exact_accepted=accepted_length(exact.agreed),
        relaxed_accepted=accepted_length(relaxed.agreed),
        loss=relaxed.lost / len(relaxed.tokens),
        is_refusal=refuses == [False, True],
        is_short=2 * len(relaxed.tokens) < len(exact.tokens),
    )


def accepted_length(agreed: Sequence[bool]) -> float:
    """Return the tokens a window commits, with chains of `_CHAIN`: the drafter's until one is wrong, and one more.

    agreed: for each token of a text, whether it was the drafter's likeliest.
    """
    num_windows = at = 0
    while at < len(agreed):
        hits = 0
        while hits < _CHAIN and at + hits < len(agreed) and agreed[at + hits]:
            hits += 1
        at += hits + 1
        num_windows += 1
    return len(agreed) / num_windows


async def _time(
    config: RelaxedConfig, codec: TextCodec, relaxation: Relaxation, questions: Sequence[str], progress: Progress
) -> dict[str, object]:
    """Return the speed-up over exact mode in the setting of arXiv:2511.11733: one stage, synchronous chains of 8."""
    timed = [question for question in questions if question.startswith(_NAMED)]
    users = UsersConfig(
        model=config.model,
        draft=config.draft,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        stages=1,
    )
    source = find_model(config.model, progress)
    shape = read_shape(source.folder)
    rows: list[dict[str, object]] = []
    async with serving_swarm(users, source, shape.num_layers, shape.vocab_size, progress) as engine:
        for number, question in enumerate(timed):
            progress.step("timed answers", number, len(timed))
            prompt = codec.encode(question, is_raw=False)
            speeds = {
                mode: await _speed(engine, prompt, codec, each)
                for mode, each in (("exact", None), ("relaxed", relaxation))
            }
            rows.append({"prompt": question[:48], **speeds, "ratio": speeds["relaxed"] / speeds["exact"]})
    ratios = [float(str(row["ratio"])) for row in rows]
    return {"speedup": sample(ratios).median, "timed": rows}


async def _speed(engine: Engine, prompt: Sequence[TokenId], codec: TextCodec, relaxation: Relaxation | None) -> float:
    text = TextRequest(max_tokens=_TIMED_TOKENS, stop_tokens=codec.stop_tokens, relaxation=relaxation)
    async with engine.generate(prompt, GenerateOptions(text=text), StaticPolicy(sync_chain(_CHAIN))) as generation:
        _ = [token async for token in generation]
    return generation.timing.tokens_per_s
