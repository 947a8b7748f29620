"""Implements `dsd quantize`: write a copy of a model whose int8 form is close to the model."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.formats import REPORT
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.lean.quality import judge, log_probabilities
from dsd_p2p.models.lean.smoothing import STRENGTH, smooth
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Span, TokenId
from node.config import QuantizeConfig
from node.console import ConsoleProgress

_WEIGHTS = "model.safetensors"
_COPIED = (".json", ".jinja", ".model", ".txt")

_FITTED_PROMPTS = (
    "What is the capital of Japan?",
    "Write a short poem about rain.",
    "How do I sort a list in Python?",
    "Explain photosynthesis in simple words.",
    "What is 15 times 12? Show your work.",
    "Translate 'good morning' into French, German and Spanish.",
    "Why do cats purr?",
    "Give me three tips for a job interview.",
)
_JUDGED_PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Write a Python function that reverses a string.",
    "What happens when water freezes?",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Name three rivers of Europe and the countries they cross.",
    "What does a compiler do?",
    "Tell me a story about an old clock.",
)
_FITTED_MODULES = ("argparse", "calendar", "configparser", "csv", "textwrap", "threading")
_JUDGED_MODULES = ("datetime", "difflib", "fractions", "heapq", "ipaddress", "statistics")
"""Modules of Python's library whose documentation serves as prose."""

_ANSWER_TOKENS, _DOCUMENT_TOKENS = 40, 300


def run(config: QuantizeConfig) -> int:
    """Write the folder and its report, print the report, and return the exit code."""
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"--output {output}: it exists; choose a new folder")
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        source.fetch(source.weights.names, progress)
        report = quantize(source, output, progress)
    print(json.dumps(report, indent=1))
    print(f"run it: dsd up --model {output} --weights int8")
    return 0


def quantize(source: ModelSource, output: Path, progress: Progress) -> dict[str, object]:
    """Write the model with smoothed weights to `output` and return the report.

    Raises:
        ModelError: the family has no int8 form.
    """
    whole = Span(0, read_shape(source.folder).num_layers)
    # A family without an int8 form is refused before minutes are spent on it.
    open_lean_span(source, Span(0, 1))
    stock = SpanModel(
        load_span(source, whole, torch.float32, "cpu"),
        pass_order(read_model_config(source.folder)),
        cache_bytes=1 << 40,
    )
    codec = TextCodec(source.folder)
    progress.step("what the float32 model says", 0, 0)
    judged = _texts(stock, codec, _JUDGED_PROMPTS, _JUDGED_MODULES)
    expected = [log_probabilities(stock, text) for text in judged]
    fitted = _texts(stock, codec, _FITTED_PROMPTS, _FITTED_MODULES)
    progress.step("smooth", 0, 0)
    smooth(stock, fitted)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        _write(stock, source, folder)
        del stock
        reports = {}
        for name, each in (("before", source), ("after", find_model(str(folder), progress))):
            progress.step(f"int8 {name} smoothing", 0, 0)
            reports[name] = judge(open_lean_span(each, whole, cache_bytes=1 << 40), judged, expected)
        report: dict[str, object] = {
            "model": source.name,
            "digest": source.digest(),
            "strength": STRENGTH,
            "fitted_on": {"prompts": _FITTED_PROMPTS, "documentation_of": _FITTED_MODULES},
            "judged_on": {"prompts": _JUDGED_PROMPTS, "documentation_of": _JUDGED_MODULES},
            "int8_before": msgspec.to_builtins(reports["before"]),
            "int8": msgspec.to_builtins(reports["after"]),
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1))
        folder.rename(output)
    return report


def _write(stock: SpanModel, source: ModelSource, folder: Path) -> None:
    """Write the model's weights in float32, its config, and what belongs to its tokenizer as it is."""
    folder.mkdir(parents=True)
    for file in source.folder.iterdir():
        if file.suffix in _COPIED and not file.name.endswith("index.json"):
            shutil.copy2(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    state = {name: tensor.contiguous() for name, tensor in stock.model.state_dict().items()}
    if stock.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


def _texts(stock: SpanModel, codec: TextCodec, prompts: Sequence[str], modules: Sequence[str]) -> list[list[TokenId]]:
    """Return the prompts with the model's own answers, and documentation."""
    answers = [_answered(stock, _encoded(codec, prompt)) for prompt in prompts]
    documents = [codec.encode(_documentation(name), is_raw=True)[:_DOCUMENT_TOKENS] for name in modules]
    return [*answers, *documents]


def _encoded(codec: TextCodec, prompt: str) -> list[TokenId]:
    """Return the prompt as a question, or as it is for a model that takes no questions."""
    try:
        return codec.encode(prompt, is_raw=False)
    except ModelError:
        return codec.encode(prompt, is_raw=True)


def _answered(stock: SpanModel, prompt: Sequence[TokenId]) -> list[TokenId]:
    tokens = list(prompt)
    cache, slots = stock.new_cache(len(prompt) + _ANSWER_TOKENS), SlotTable()
    forward, given = slots.chain(len(prompt)), tokens
    for _ in range(_ANSWER_TOKENS):
        (view,) = stock.views(cache, forward, given, [len(given) - 1])
        tokens = [*tokens, view.argmax()]
        forward = slots.append([len(tokens) - 1], [len(tokens) - 2], [len(tokens) - 1])
        given = tokens[-1:]
    cache.free()
    return tokens


def _documentation(name: str) -> str:
    module = import_module(name)
    members = [module, *(each for _, each in inspect.getmembers(module) if getattr(each, "__module__", "") == name)]
    return "\n\n".join(text for each in members if (text := inspect.getdoc(each)))
