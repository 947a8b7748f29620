"""Records the agreement of two real models (`dsd sim record`)."""

import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import compute_format, find_model
from dsd_p2p.models.span import TORCH_DTYPES
from dsd_p2p.models.text import TextCodec
from dsd_p2p.session.effects import NUM_CANDIDATES
from dsd_p2p.sim.agreement import Agreement, RecordedText
from dsd_p2p.types import TokenId
from node.lab.config import RecordConfig
from node.lab.quality.prompts import CATEGORIES, Problem, load_problems, spread
from node.lab.simulator.asking import MAX_CENTINATS


def record_agreement(config: RecordConfig, progress: Progress) -> Agreement:
    """Let the target answer prompts of every category greedily, then ask the drafter for candidates along each answer.

    Raises:
        ModelError: a model or the prompts cannot be loaded.
    """
    problems = [
        problem for category in CATEGORIES for problem in spread(load_problems(category, progress), config.texts)
    ]
    codec = TextCodec(find_model(config.model, progress).folder)
    prompts = [codec.encode(problem.prompt, is_raw=False) for problem in problems]
    model = _load(config.model, config.dtype, config.device, progress)
    answers: list[list[TokenId]] = []
    for start in range(0, len(prompts), config.batch):
        answers += _write_batch(
            model, prompts[start : start + config.batch], config.max_tokens, codec.stop_tokens, config.device
        )
        progress.step("record the target", len(answers), len(prompts))
    del model
    model = _load(config.draft, config.dtype, config.device, progress)
    texts = []
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        texts.append(_ask_drafter(model, problem, prompt, answer, config.device))
        progress.step("record the drafter", len(texts), len(problems))
    return Agreement(
        target=config.model,
        drafter=config.draft,
        dtype=config.dtype,
        command=" ".join(["dsd", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        vocab_size=int(model.config.vocab_size),
        texts=tuple(texts),
    )


def _load(name: str, dtype: str, device: str, progress: Progress) -> Any:
    progress.step(f"load {name}", 0, 0)
    return load_whole(find_model(name, progress), TORCH_DTYPES[compute_format(dtype)], device)


@torch.inference_mode()
def _write_batch(
    model: Any, prompts: Sequence[list[TokenId]], num_tokens: int, stop_tokens: Collection[TokenId], device: str
) -> list[list[TokenId]]:
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop_tokens),
        pad_token_id=0,
    )
    return [_until_stop(row[longest:].tolist(), stop_tokens) for row in output]


def _until_stop(tokens: list[TokenId], stop_tokens: Collection[TokenId]) -> list[TokenId]:
    for index, token in enumerate(tokens):
        if token in stop_tokens:
            return tokens[: index + 1]
    return tokens


@torch.inference_mode()
def _ask_drafter(
    model: Any, problem: Problem, prompt: list[TokenId], answer: list[TokenId], device: str
) -> RecordedText:
    text = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    logits = model(text, logits_to_keep=len(answer)).logits[0]
    best = torch.log_softmax(logits.float(), dim=-1).topk(NUM_CANDIDATES)
    centinats = [
        tuple(round(-100 * value) for value in row if -100 * value <= MAX_CENTINATS) for row in best.values.tolist()
    ]
    return RecordedText(
        category=problem.category,
        source=problem.name,
        tokens=tuple(answer),
        draft_tokens=tuple(tuple(row[: len(kept)]) for row, kept in zip(best.indices.tolist(), centinats, strict=True)),
        draft_centinats=tuple(centinats),
    )
