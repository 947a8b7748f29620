"""Implements `dsd verify`: say whether a finished answer is what its model writes."""

import sys
from pathlib import Path

import msgspec
import torch

from dsd_p2p.coordination.verify import judge_answer
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import open_span
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span
from node.client.answer import WrittenAnswer
from node.config import VerifyConfig
from node.console import ConsoleProgress


def run(config: VerifyConfig) -> int:
    """Judge the answer in a file of `dsd generate --json`. Return 1 if it is not the model's own."""
    try:
        data = sys.stdin.buffer.read() if config.answer == "-" else Path(config.answer).read_bytes()
        answer = msgspec.json.decode(data, type=WrittenAnswer)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"{config.answer}: {exc}; expected what `dsd generate --json` prints") from exc
    asked = answer.asked
    torch.set_num_threads(config.threads)
    with ConsoleProgress() as progress:
        source = find_model(config.model or asked.model, progress)
        if source.key(asked.key.weights) != asked.key:
            raise ConfigError(
                f"{config.model or asked.model} is not the model that the answer names ({asked.key.digest[:12]}): give "
                "--model"
            )
        source.fetch(source.weights.names, progress)
        num_layers = read_shape(source.folder).num_layers
        model = open_span(source, Span(0, num_layers), dtype=asked.key.weights)
    judged = judge_answer(model, asked.key, num_layers, asked.text, asked.prompt_ids, answer.token_ids)
    if config.json:
        print(msgspec.json.encode(judged).decode())
    elif judged.is_honest:
        print(f"honest: {judged.num_tokens} tokens, {judged.num_others} of them missed the model's own pick by a hair")
    else:
        print(
            f"not honest: token {judged.first_other} of {judged.num_tokens} is not the model's own; the widest gap is "
            f"{judged.worst_gap:.3f} logits, honest rounding is {judged.noise:.6f} (probability {judged.probability:.1e})"
        )
    return 0 if judged.is_honest else 1
