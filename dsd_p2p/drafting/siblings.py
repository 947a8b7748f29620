"""Finds small models that can draft for a target: published siblings by family, and models in folders beside it.

A name promises nothing: a sibling drafts only if its tokenizer gives the same text to every token (`check_vocabulary`).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.models.text import load_tokenizer

logger = logging.getLogger(__name__)

_SIBLINGS: dict[str, tuple[str, ...]] = {
    "llama": ("meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "JackFram/llama-68m"),
    "qwen2": ("Qwen/Qwen2.5-0.5B-Instruct",),
    "qwen2_moe": ("Qwen/Qwen1.5-0.5B-Chat",),
    "qwen3": ("Qwen/Qwen3-0.6B",),
    "qwen3_moe": ("Qwen/Qwen3-0.6B",),
    "qwen3_5_text": ("Qwen/Qwen3.5-0.8B",),
    "qwen3_5_moe_text": ("Qwen/Qwen3.5-0.8B",),
    "gemma2": ("google/gemma-2-2b-it",),
    "gemma3_text": ("google/gemma-3-270m-it", "google/gemma-3-1b-it"),
    "mistral": ("alamios/Mistral-Small-3.1-DRAFT-0.5B",),
    "ministral": ("mistralai/Ministral-3-3B-Instruct-2512",),
    "deepseek_v2": ("deepseek-ai/DeepSeek-V2-Lite-Chat",),
    "deepseek_v3": ("jukofyork/DeepSeek-V3-0324-DRAFT-0.6B-v3.0",),
    "gpt_oss": ("openai/gpt-oss-20b",),
    "glm4_moe": ("jukofyork/GLM-4.5-DRAFT-0.6B-v3.0",),
    "granite": ("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-4.0-350m"),
    "granitemoehybrid": ("ibm-granite/granite-4.0-350m",),
    "olmo2": ("allenai/OLMo-2-0425-1B-Instruct",),
    "phi3": ("microsoft/Phi-3-mini-4k-instruct",),
}
"""Published small models by the target's `model_type`, the most useful first."""

_MAX_SHARE = 0.6
"""A sibling beside the target has at most this share of its weights: a larger one would take longer than it gains."""

_USUAL_SHARE = 0.1
_MAX_FOLDERS = 32
_MIN_COMMON = 0.95
"""Share of the target's tokens that a sibling must know: published siblings lack a few added tokens."""


def published_siblings(target: ModelSource) -> Sequence[str]:
    """Return the hub ids of small models of the target's family."""
    return _SIBLINGS.get(str(read_model_config(target.folder).model_type), ())


def siblings_beside(target: ModelSource) -> Sequence[str]:
    """Return the folders and GGUF files beside `target` that hold a smaller model.

    Those of a tenth of its size and of its family come first.
    """
    size, family = target.num_params(), read_model_config(target.folder).model_type
    found = []
    for path in _beside(target.path):
        try:
            other = find_model(str(path), NoProgress())
            share = other.num_params() / max(1, size)
            is_stranger = read_model_config(other.folder).model_type != family
        except ModelError as exc:
            logger.info("no sibling path=%s error=%s", path, exc)
            continue
        if 0 < share <= _MAX_SHARE:
            found.append((is_stranger, abs(math.log(share / _USUAL_SHARE)), str(path)))
    return [name for _, _, name in sorted(found)]


def _beside(path: Path) -> Iterator[Path]:
    """Yield folders with models and, if the model is a GGUF file, smaller files of the kind."""
    for each in sorted(path.parent.iterdir())[:_MAX_FOLDERS]:
        if each == path:
            continue
        is_smaller_file = path.is_file() and each.suffix == ".gguf" and each.stat().st_size < path.stat().st_size
        if is_smaller_file or (each / "config.json").is_file():
            yield each


def check_vocabulary(target: Path, sibling: Path, name: str) -> None:
    """Check that both tokenizers give the same text to the same token.

    Raises:
        ConfigError: they differ; the text names a token.
    """
    ours, theirs = _texts(target), _texts(sibling)
    if not ours or not theirs:
        # Without tokenizers only the number of tokens can be compared.
        sizes = read_shape(target).vocab_size, read_shape(sibling).vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"drafter {name}: expected the target's {sizes[0]} tokens, got {sizes[1]}; choose a drafter with the "
                "target's tokenizer"
            )
        return
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            raise ConfigError(
                f"drafter {name}: its tokenizer differs from the target's, token {token} is {theirs[token]!r} there and "
                f"{ours[token]!r} in the target; choose a drafter with the target's tokenizer"
            )
    num_common = len(ours.keys() & theirs.keys())
    if num_common < _MIN_COMMON * len(ours):
        raise ConfigError(
            f"drafter {name}: its tokenizer knows {num_common} of the target's {len(ours)} tokens; choose a drafter with "
            "the target's tokenizer"
        )


def _texts(folder: Path) -> dict[int, str]:
    """Return the text of each token as the tokenizer writes it; empty without a tokenizer."""
    tokenizer, _why_not = load_tokenizer(folder)
    return {} if tokenizer is None else {token: text for text, token in tokenizer.get_vocab().items()}
