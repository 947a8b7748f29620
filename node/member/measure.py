"""Measures how fast this machine computes a model's layers. The result is cached per model and hardware."""

import hashlib
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from dsd_p2p import units
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.device import check_device, device_type
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.placement.view import WIDE_WINDOW_NODES
from dsd_p2p.stage.span_model import SpanModel as StageModel
from dsd_p2p.types import Span
from dsd_p2p.wire.membership import PeerProfile
from node.config import ComputeFlags, ServeFlags
from node.config.machine import available_bytes

_REPEATS = 9
_CONTEXT = 64
_MEMORY_SHARE = 0.6
"""Share of the free memory to use: the rest is for activations and for other programs."""


class _Measured(msgspec.Struct, frozen=True):
    layer_s: float
    layer16_s: float
    layer_bytes: int


class Machine(Protocol):
    """How a peer measures its machine and runs a span on it. `node.lab.slow` has a slow one for tests."""

    def measure(self, source: ModelSource, config: ServeFlags, dtype: str) -> PeerProfile:
        """Return the speed of this machine with one layer of the model. Raises as `measure_node` does."""
        ...

    def serve(self, model: StageModel) -> StageModel:
        """Return the model that serves the loaded span."""
        ...


class ThisMachine:
    """This machine, at its real speed."""

    def measure(self, source: ModelSource, config: ServeFlags, dtype: str) -> PeerProfile:
        """See `measure_node`."""
        return measure_node(source, config, dtype)

    def serve(self, model: StageModel) -> StageModel:
        """Return the model itself."""
        return model


def measure_node(source: ModelSource, config: ServeFlags, dtype: str) -> PeerProfile:
    """Return how fast this machine computes one layer of the model, and how many layers fit in its memory.

    Raises:
        ConfigError, ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    file = default_cache_dir() / "profiles" / f"{_fingerprint(source, config, dtype)}.json"
    measured = _read(file)
    if measured is None:
        measured = _measure(source, config, dtype)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(measured))
    num_layers = read_shape(source.folder).num_layers
    if config.max_layers:
        room = config.max_layers
    else:
        free_bytes = units.num_bytes(config.memory) if config.memory else _MEMORY_SHARE * _free_bytes(config.device)
        room = int((free_bytes - units.num_bytes(config.cache_memory)) / measured.layer_bytes)
    return PeerProfile(
        layer_us=round(measured.layer_s * 1e6),
        layer16_us=round(measured.layer16_s * 1e6),
        max_layers=max(1, min(room, num_layers)),
    )


def _measure(source: ModelSource, config: ServeFlags, dtype: str) -> _Measured:
    num_layers = read_shape(source.folder).num_layers
    middle = num_layers // 2
    span = Span(middle, middle + 1)
    if num_layers == 1:
        span = Span(0, 1)
    model = open_span(source, span, dtype=dtype, device=config.device)
    return _Measured(
        layer_s=pass_s(model, 1),
        layer16_s=pass_s(model, WIDE_WINDOW_NODES),
        layer_bytes=model.weight_bytes,
    )


def pass_s(model: OpenSpan, num_nodes: int) -> float:
    """Return the median seconds of a pass over `num_nodes` nodes after a context of at least 64 tokens."""
    cache = model.new_cache(_CONTEXT + (_REPEATS + 2) * num_nodes)
    slots = SlotTable()

    def run(start: int, count: int) -> None:
        nodes = range(start, start + count)
        forward = slots.append(nodes, [None, *nodes[:-1]], nodes)
        inputs = [0] * count if model.is_head else bytes(count * model.row_bytes)
        if model.is_tail:
            model.views(cache, forward, inputs, range(count))
        else:
            model.hidden(cache, forward, inputs)
        slots.settle(nodes[-1])

    run(0, _CONTEXT)
    starts = iter(range(_CONTEXT, _CONTEXT + (_REPEATS + 1) * num_nodes, num_nodes))
    seconds = _median_s(lambda: run(next(starts), num_nodes))
    cache.free()
    return seconds


def _median_s(action: Callable[[], object]) -> float:
    action()
    samples = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start_s)
    return statistics.median(samples)


def _read(file: Path) -> _Measured | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Measured)
    except (OSError, msgspec.DecodeError):
        return None


def _free_bytes(device: str) -> int:
    """Return the memory that is free for layers and caches, on the card if they are there.

    Raises:
        ConfigError: torch has no such device.
    """
    if device_type(device) == "cuda":
        check_device(device)
        return min(available_bytes(), int(torch.cuda.mem_get_info(device)[0]))
    return available_bytes()


def _fingerprint(source: ModelSource, config: ServeFlags, dtype: str) -> str:
    """Return a hash of everything a measurement depends on: processor, torch version, model, and settings."""
    hardware = [_processor(), torch.__version__, str(config.threads), config.device]
    if config.device != "cpu" and torch.cuda.is_available():
        hardware.append(torch.cuda.get_device_name())
    return hashlib.sha256("\n".join([*hardware, source.digest(), dtype]).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe_machine(config: ComputeFlags) -> str:
    """Return the processor, the torch version and the settings in one line."""
    return f"{_processor()}, torch {torch.__version__}, {config.device}, {config.threads} thread(s)"
