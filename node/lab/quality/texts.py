"""Texts to fit and to judge a model's formats by: its own answers to a few prompts, and documentation as prose."""

import inspect
from collections.abc import Sequence
from importlib import import_module

import msgspec

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import ModelError
from dsd_p2p.models.span import SpanModel
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId


class Texts(msgspec.Struct, frozen=True, kw_only=True):
    """Where texts come from. documentation_of: modules of Python's library."""

    prompts: tuple[str, ...]
    documentation_of: tuple[str, ...]


FITTED = Texts(
    prompts=(
        "What is the capital of Japan?",
        "Write a short poem about rain.",
        "How do I sort a list in Python?",
        "Explain photosynthesis in simple words.",
        "What is 15 times 12? Show your work.",
        "Translate 'good morning' into French, German and Spanish.",
        "Why do cats purr?",
        "Give me three tips for a job interview.",
    ),
    documentation_of=(
        "argparse",
        "calendar",
        "configparser",
        "csv",
        "textwrap",
        "threading",
    ),
)
JUDGED = Texts(
    prompts=(
        "Why is the sky blue?",
        "Write a haiku about the sea.",
        "Write a Python function that reverses a string.",
        "What happens when water freezes?",
        "A train travels 60 km in 45 minutes. How fast is it?",
        "Name three rivers of Europe and the countries they cross.",
        "What does a compiler do?",
        "Tell me a story about an old clock.",
    ),
    documentation_of=(
        "datetime",
        "difflib",
        "fractions",
        "heapq",
        "ipaddress",
        "statistics",
    ),
)

_ANSWER_TOKENS, _DOCUMENT_TOKENS = 40, 300


def texts_of(stock: SpanModel, codec: TextCodec, texts: Texts) -> list[list[TokenId]]:
    """Return the prompts with the model's own answers, and documentation, as tokens."""
    answers = [_answered(stock, _encoded(codec, prompt)) for prompt in texts.prompts]
    documents = [codec.encode(_documentation(name), is_raw=True)[:_DOCUMENT_TOKENS] for name in texts.documentation_of]
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
