"""Tries every family of decoder models that transformers knows, with tiny random weights.

How it works. A tiny model of the family is saved and opened as a stage would open it, which refuses what is not
supported. What opens is run in three spans, window by window, and its text is compared with that of the whole model.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import DsdError, ModelError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.families import pass_order, random_model
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.shrink import VOCAB, shrink
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.types import Span

BEGIN, END = "<!-- families: made by dsd models families --page docs/models.md -->", "<!-- end of families -->"

_NUM_TOKENS = 16

_SAMPLES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "gemma4": {"hidden_size_per_layer_input": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 8
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm3": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 6},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""What published checkpoints of these families set and the default config leaves out."""


class FamilyStatus(StrEnum):
    """What became of a family: the whole model's text, a refusal in one sentence, another text, or a crash."""

    EXACT = "exact"
    REFUSED = "refused"
    WRONG = "wrong"
    FAILED = "failed"


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A family's status, and the reason if it is not exact."""

    status: FamilyStatus
    reason: str = ""


def all_families() -> list[str]:
    """Return the names of all families with a causal language model, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_families(names: list[str]) -> Iterator[tuple[str, Family]]:
    """Yield each family's name and what became of it."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in names:
        try:
            reason = _try(name)
        except DsdError as exc:
            yield name, Family(status=FamilyStatus.REFUSED, reason=str(exc))
        except Exception as exc:  # What the loader did not foresee is what this is to find.
            yield name, Family(status=FamilyStatus.FAILED, reason=f"{type(exc).__name__}: {exc}")
        else:
            yield name, Family(status=FamilyStatus.WRONG if reason else FamilyStatus.EXACT, reason=reason)


def sample_config(name: str) -> Any:
    """Return the text config of a small published model of the family."""
    config = CONFIG_MAPPING[name]().get_text_config(decoder=True)
    for field, value in _SAMPLES.get(name, {}).items():
        setattr(config, field, value)
    return config


def with_table(page: str, families: Mapping[str, Family]) -> str:
    """Return the page with the table between its marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [f"| `{name}` | {family.status} | {_short(name, family.reason)} |" for name, family in families.items()]
    table = "\n".join(["| family | status | why |", "|---|---|---|", *rows])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _short(name: str, reason: str) -> str:
    return reason.removeprefix(f"{name}: ").replace("|", "\\|").replace("\n", " ")


def _try(name: str) -> str:
    """Return how the split model's text differs from the whole's, or an empty string.

    Raises:
        DsdError: the family is refused.
    """
    try:
        config = sample_config(name)
    except Exception as exc:
        raise ModelError(f"{name}: transformers has no default config of this family ({type(exc).__name__})") from exc
    pass_order(config)
    whole = random_model(shrink(config))
    rng = np.random.default_rng(len(name))
    prompt = rng.integers(3, VOCAB, 24).tolist()
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        written = _write(find_model(folder, NoProgress()), prompt, rng)
    expected = _greedy(whole, prompt)
    return "" if written == expected else f"{name}: writes {written}, the whole model writes {expected}"


def _greedy(whole: Any, prompt: list[int]) -> list[int]:
    """Return the whole model's next tokens, each from the plain text so far."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(_NUM_TOKENS):
            text.append(int(whole(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def _write(source: ModelSource, prompt: list[int], rng: np.random.Generator) -> list[int]:
    """Return what the split model writes, with a wrong guess in every window beside the last token."""
    num_layers = read_shape(source.folder).num_layers
    cuts = sorted({0, num_layers // 3, 2 * num_layers // 3, num_layers})
    stages = [open_span(source, Span(*bounds)) for bounds in itertools.pairwise(cuts)]
    caches = [stage.new_cache(len(prompt) + 4 * _NUM_TOKENS) for stage in stages]
    tables = [SlotTable() for _ in stages]
    text, next_node = list(prompt), 0
    tokens, parents = list(prompt), [None, *range(len(prompt) - 1)]
    while len(text) < len(prompt) + _NUM_TOKENS:
        nodes = range(next_node, next_node + len(tokens))
        start = len(text) - 1 if next_node else 0
        positions = [start] * len(tokens) if next_node else list(range(len(tokens)))
        values: Any = tokens
        for stage, cache, table in zip(stages, caches, tables, strict=True):
            forward = table.append(nodes, parents, positions)
            if stage.is_tail:
                (view,) = stage.views(cache, forward, values, [len(tokens) - 1])
            else:
                values = stage.hidden(cache, forward, values)
        for cache, table in zip(caches, tables, strict=True):
            edit = table.settle(nodes[-1])
            if edit is not None:
                cache.edit(edit)
        text.append(view.argmax())
        next_node += len(tokens)
        tokens = [*rng.integers(3, VOCAB, int(rng.integers(0, 3))).tolist(), text[-1]]
        parents = [None] * len(tokens)
    return text[len(prompt) :]
