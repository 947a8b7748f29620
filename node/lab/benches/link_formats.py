"""Implements `dsd bench formats`: what smaller hidden states save on links, and how they change the target's picks."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import compute_format, find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import ComputeFormat, HiddenFormat, Span, TokenId
from dsd_p2p.wire.hidden import pack, packed_row_bytes, unpack
from node.lab.config import SplitConfig
from node.lab.quality.prompts import CATEGORIES, load_problems, spread
from node.lab.receipt import print_table

_PROMPTS_PER_CATEGORY = 4


def run_formats(config: SplitConfig, progress: Progress) -> dict[str, object]:
    """Run prompts through the model's stages in this process, with each link format, and compare all positions.

    Raises:
        ModelError: the model or the prompts cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    num_layers = read_shape(source.folder).num_layers
    progress.step(f"load {config.model}", 0, 0)
    stages = [
        open_span(source, Span(*bounds), dtype=config.dtype, device=config.device)
        for bounds in even_spans(num_layers, config.stages)
    ]
    codec = TextCodec(source.folder)
    prompts = [
        codec.encode(problem.prompt, is_raw=False)
        for category in CATEGORIES
        for problem in spread(load_problems(category, progress), _PROMPTS_PER_CATEGORY)
    ]
    formats = [each for each in HiddenFormat if each is not HiddenFormat.BF16 or config.dtype == "float32"]
    measured = {each: _Measured() for each in formats}
    for number, prompt in enumerate(prompts):
        reference = _run(stages, prompt, compute_format(config.dtype), HiddenFormat.MODEL, measured[HiddenFormat.MODEL])
        for each in formats:
            logprobs = _run(stages, prompt, compute_format(config.dtype), each, measured[each])
            measured[each].compare(reference, logprobs)
        progress.step("compare formats", number + 1, len(prompts))
    row_bytes = stages[0].row_bytes
    rows = []
    report: dict[str, object] = {}
    for each, result in measured.items():
        node_bytes = packed_row_bytes(row_bytes, compute_format(config.dtype), each)
        report[each] = {
            "bytes_a_node": node_bytes,
            "relative_error": result.relative_error,
            "mean_kl_nats": result.kl / result.num_positions,
            "flipped_picks": result.num_flips,
            "positions": result.num_positions,
        }
        flips = f"{result.num_flips} of {result.num_positions}"
        rows.append(
            (each, str(node_bytes), f"{result.relative_error:.2e}", f"{result.kl / result.num_positions:.2e}", flips)
        )
    print_table(("format", "bytes a node", "relative error", "KL, nats", "other picks"), rows)
    return {"model": config.model, "dtype": config.dtype, "stages": config.stages, "formats": report}


class _Measured:
    """The errors of one format over all prompts."""

    def __init__(self) -> None:
        self.error = self.norm = self.kl = 0.0
        self.num_flips = self.num_positions = 0

    @property
    def relative_error(self) -> float:
        """The root mean square error of the hidden states, divided by their root mean square before packing."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    def compare(self, reference: torch.Tensor, logprobs: torch.Tensor) -> None:
        self.num_positions += len(reference)
        self.num_flips += int((reference.argmax(-1) != logprobs.argmax(-1)).sum())
        self.kl += float((reference.exp() * (reference - logprobs)).sum())


def _run(
    stages: Sequence[OpenSpan],
    prompt: list[TokenId],
    compute: ComputeFormat,
    hidden_format: HiddenFormat,
    measured: _Measured,
) -> torch.Tensor:
    """Return the log probabilities `[n, V]` after every position, float32."""
    inputs: list[TokenId] | bytes = prompt
    num_nodes = len(prompt)
    forward = SlotTable().chain(num_nodes)
    for stage in stages[:-1]:
        cache = stage.new_cache(num_nodes)
        hidden = stage.hidden(cache, forward, inputs)
        cache.free()
        inputs = unpack(pack(hidden, stage.row_bytes, compute, hidden_format), stage.row_bytes, compute, hidden_format)
        sent, received = _floats(hidden, stage), _floats(inputs, stage)
        measured.error += float(np.square(sent - received).sum())
        measured.norm += float(np.square(sent).sum())
    cache = stages[-1].new_cache(num_nodes)
    views = stages[-1].views(cache, forward, inputs, range(num_nodes))
    cache.free()
    return torch.log_softmax(torch.stack([view.row.float().cpu() for view in views]), dim=-1)


def _floats(data: bytes, stage: OpenSpan) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return torch.frombuffer(bytearray(data), dtype=stage.torch_dtype).double().numpy()
