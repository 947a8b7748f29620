"""Implements `dsd bench relaxed`: answers the same problems in exact and relaxed mode and judges every answer."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import GREEDY
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import Verifier
from dsd_p2p.verification.exact import ExactVerifier
from node.config.relaxation import Thresholds
from node.lab.config import RelaxedConfig
from node.lab.quality.pair_writer import PairWriter, Written
from node.lab.quality.prompts import Problem, load_problems, spread
from node.lab.quality.sandbox import passes
from node.lab.receipt import print_table

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_FENCE = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


class ModeResult(msgspec.Struct, kw_only=True):
    """The result of one mode over all problems."""

    solved: list[str]
    num_tokens: int
    relaxed_share: float
    target_logprob_per_token: float


class Drift(msgspec.Struct, kw_only=True):
    """The result of one set of thresholds, compared with exact mode problem by problem."""

    relaxation: dict[str, object]
    budget_nats: float
    result: ModeResult
    solved_only_exact: list[str]
    solved_only_relaxed: list[str]


def run_relaxed(config: RelaxedConfig, thresholds: Sequence[Thresholds], progress: Progress) -> dict[str, object]:
    """Answer `config.problems` problems each of maths and of code, in exact mode and with each set of thresholds.

    Raises:
        ModelError: a model or the problems cannot be loaded.
    """
    codec = TextCodec(find_model(config.model, progress).folder)
    problems = [
        problem for name in ("maths", "code") for problem in spread(load_problems(name, progress), config.problems)
    ]
    writer = PairWriter(config.model, config.draft, dtype=config.dtype, device=config.device, progress=progress)

    def answer(verifier: Verifier, label: str) -> ModeResult:
        texts: list[Written] = []
        for start in range(0, len(problems), config.batch):
            batch = problems[start : start + config.batch]
            prompts = [codec.encode(problem.prompt, is_raw=False) for problem in batch]
            texts += writer.write(prompts, config.max_tokens, codec.stop_tokens, verifier)
            progress.step(f"answer in {label} mode", len(texts), len(problems))
        answers = [codec.decode(text.tokens) for text in texts]
        with ThreadPoolExecutor(max_workers=2) as pool:
            is_solved = list(pool.map(solves, problems, answers))
        num_tokens = sum(len(text.tokens) for text in texts)
        return ModeResult(
            solved=[problem.name for problem, solved in zip(problems, is_solved, strict=True) if solved],
            num_tokens=num_tokens,
            relaxed_share=sum(text.num_relaxed for text in texts) / num_tokens,
            target_logprob_per_token=sum(text.logprob for text in texts) / num_tokens,
        )

    exact = answer(ExactVerifier(GREEDY), "exact")
    drifts = []
    for each in thresholds:
        relaxed = answer(
            AdaptiveVerifier(GREEDY, each.relaxation, codec.stop_tokens), f"relaxed (τ={each.relaxation.tau})"
        )
        drifts.append(
            Drift(
                relaxation=msgspec.structs.asdict(each.relaxation),
                budget_nats=each.budget_nats,
                result=relaxed,
                solved_only_exact=sorted(set(exact.solved) - set(relaxed.solved)),
                solved_only_relaxed=sorted(set(relaxed.solved) - set(exact.solved)),
            )
        )
    _print(exact, drifts, len(problems))
    return {
        "config": msgspec.to_builtins(config),
        "problems": [problem.name for problem in problems],
        "exact": exact,
        "relaxed": drifts,
    }


def _print(exact: ModeResult, drifts: Sequence[Drift], num_problems: int) -> None:
    rows = [("exact", "", f"{len(exact.solved)}", "", "", f"{exact.target_logprob_per_token:.4f}")]
    rows += [
        (
            f"relaxed τ={drift.relaxation['tau']}, budget {drift.budget_nats:g}",
            f"{drift.result.relaxed_share:.2%}",
            f"{len(drift.result.solved)}",
            f"{len(drift.solved_only_exact)}",
            f"{len(drift.solved_only_relaxed)}",
            f"{drift.result.target_logprob_per_token:.4f}",
        )
        for drift in drifts
    ]
    print_table(
        ("mode", "relaxed tokens", f"solved of {num_problems}", "only exact", "only relaxed", "ln P a token"), rows
    )


def solves(problem: Problem, answer: str) -> bool:
    """Return whether the answer gives GSM8K's number, or its code passes HumanEval's tests."""
    if problem.category == "maths":
        return _number_in(answer) == _number_in(problem.expected)
    blocks = _FENCE.findall(answer)
    code = next((block for block in blocks if f"def {problem.entry_point}" in block), blocks[0] if blocks else answer)
    # `signature` brings the imports and helpers that precede the function; the answer then defines the function again.
    program = f"{problem.signature}    pass\n\n{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    return passes(program)


def _number_in(text: str) -> float | None:
    found = _NUMBER.findall(text.rpartition("####")[2] if "####" in text else text)
    return float(found[0 if "####" in text else -1].replace(",", "")) if found else None
