"""Captures passes as CUDA graphs and replays them; without a GPU, runs them over the same buffers."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsd_p2p.models.captured.buffers import Bucket, Buffers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Hidden states `[rows, H]`, or logits `[wanted, V]` with the best token of each and whether all are finite."""

    values: Tensor
    best: Tensor | None = None
    is_finite: Tensor | None = None


Compute = Callable[[Buffers], Outputs]
Replay = Callable[[], Outputs]
Capture = Callable[[Compute, Buffers], Replay]
"""Returns what computes a pass again over the same buffers. Its outputs are overwritten by the next replay."""


class Graphs:
    """The passes of one span that were captured, by bucket. capture: None runs every pass as it is."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._buffers: dict[Bucket, Buffers] = {}
        self._replays: dict[Bucket, Replay] = {}
        self._generation = 0

    def buffers(self, bucket: Bucket, make: Callable[[], Buffers]) -> Buffers:
        """Return the buffers of a bucket: the same for every pass, if it is one that comes again."""
        if not bucket.is_captured:
            return make()
        if bucket not in self._buffers:
            self._buffers[bucket] = make()
        return self._buffers[bucket]

    def run(self, bucket: Bucket, buffers: Buffers, compute: Compute, generation: int) -> Outputs:
        """Return the outputs of a pass. Use them before the next one. generation: the arena's."""
        if self._capture is None or not bucket.is_captured:
            return compute(buffers)
        if generation != self._generation:
            self._replays.clear()
            self._generation = generation
        if bucket not in self._replays:
            # The first pass makes what a capture must not: a layer's slots, a library's workspace.
            outputs = compute(buffers)
            self._try_to_capture(bucket, buffers, compute)
            return outputs
        return self._replays[bucket]()

    def _try_to_capture(self, bucket: Bucket, buffers: Buffers, compute: Compute) -> None:
        assert self._capture is not None
        try:
            self._replays[bucket] = self._capture(compute, buffers)
        except RuntimeError as exc:
            logger.warning("passes run without CUDA graphs, which is slower: this model cannot be captured: %s", exc)
            self._capture = None
            self._replays.clear()


_capturing = threading.Lock()
"""CUDA allows one capture at a time in a process."""


def cuda_graphs() -> Capture:
    """Return what captures passes on the current CUDA device. All graphs share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Compute, buffers: Buffers) -> Replay:
        with _capturing:
            return captured(compute, buffers)

    def captured(compute: Compute, buffers: Buffers) -> Replay:
        # Libraries set themselves up in their first calls on a stream, which no capture allows.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute(buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, such as a drafter's, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = compute(buffers)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    return capture
