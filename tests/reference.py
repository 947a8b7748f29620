"""What the unsplit model writes, by transformers' own greedy generate."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model


@functools.cache
def _unsplit(path: Path) -> Any:
    if path.suffix == ".gguf":
        # That these are the weights that transformers reads is tested on its own (tests/models/test_gguf.py).
        return load_whole(find_model(str(path), NoProgress()), torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def greedy(path: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([list(prompt)])
    output = _unsplit(path).generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def logits(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of every position, `[len(tokens), V]`."""
    with torch.inference_mode():
        return _unsplit(path)(torch.tensor([list(tokens)])).logits[0]
