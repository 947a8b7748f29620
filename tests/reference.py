"""What the unsplit model writes, by transformers' own greedy generate."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@functools.cache
def _unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([list(prompt)])
    output = _unsplit(folder).generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of every position, `[len(tokens), V]`."""
    with torch.inference_mode():
        return _unsplit(folder)(torch.tensor([list(tokens)])).logits[0]
