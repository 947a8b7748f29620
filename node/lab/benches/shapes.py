"""Times one layer of each kind of a large model, at its real shape and with random weights: a step beside a tree window.

How it works. A model of one layer and a small vocabulary is built for each kind of layer. It writes token by token,
and in turns it computes windows of a random tree, of which a path is committed. Hooks time the part that looks along
the text (attention or recurrence) apart from the whole layer, because experts weigh more the more rows there are.
"""

import random
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dsd_p2p.cache.passes import SpanPass
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.loader import wrap_whole
from dsd_p2p.models.packed import can_pack, pack_linear_layers
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.recurrent.cache import HybridCache
from dsd_p2p.models.source import compute_format
from dsd_p2p.models.span import TORCH_DTYPES, PassOrder, SpanModel
from node.lab.config import PassConfig
from node.lab.receipt import print_table, sample

_VOCAB, _CONTEXT, _COMMITTED, _SEED = 512, 256, 4, 0
_RECURRENT = ("linear_attention", "full_attention")

SHAPES: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, Any]]] = {
    "qwen3-next-80b": ("qwen3_next", _RECURRENT, {}),
    "kimi-linear-48b": ("kimi_linear", _RECURRENT, {}),
    "granite-4-h-small": (
        "granitemoehybrid",
        _RECURRENT,
        {
            "num_key_value_heads": 8,
            "mamba_d_state": 128,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "intermediate_size": 768,
            "shared_intermediate_size": 1536,
        },
    ),
    "falcon-h1-7b": (
        "falcon_h1",
        ("hybrid",),
        {
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
        },
    ),
    "lfm2-1.2b": (
        "lfm2",
        ("conv", "full_attention"),
        {"hidden_size": 2048, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        ("full_attention",),
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        ("full_attention",),
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
"""By name: the family, the kinds of its layers, and what differs from the family's default config."""


def run_pass(config: PassConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time a step and a tree window of each kind of layer, in turns.

    Raises:
        ConfigError: there is no such shape or number format.
    """
    if config.shape not in SHAPES:
        raise ConfigError(f"--shape {config.shape}: expected one of {', '.join(SHAPES)}")
    torch.set_num_threads(config.threads)
    family, kinds, _ = SHAPES[config.shape]
    layers: dict[str, object] = {}
    rows = []
    for number, kind in enumerate(kinds):
        progress.step(f"layer of {config.shape}, {kind}", number, len(kinds))
        layer = _Layer(config, kind)
        layers[kind] = found = layer.measure(rounds)
        rows.append((kind, *(f"{found[name]:.2f}" for name in ("step_ms", "window_ms", "ratio", "mixer_ratio"))))
        del layer
    print_table((f"{config.shape}, {config.window_nodes} nodes", "step, ms", "window, ms", "ratio", "mixer"), rows)
    return {
        "shape": config.shape,
        "family": family,
        "dtype": config.dtype,
        "threads": config.threads,
        "window_nodes": config.window_nodes,
        "context": _CONTEXT,
        "seed": _SEED,
        "layers": layers,
    }


class _Layer:
    """A model of one layer, a session in it, and the seconds that its mixers took."""

    def __init__(self, config: PassConfig, kind: str) -> None:
        self._num_nodes = config.window_nodes
        self._rng = random.Random(_SEED)  # noqa: S311 - a benchmark's tree
        self._model = _one_layer(config, kind)
        self._cache: Any = self._model.new_cache(1 << 14)
        self._table = SlotTable()
        self._next_node = 0
        self._mixer_s = 0.0
        layers = {id(each) for each in self._model.model.base_model.layers}
        for module in self._model.model.modules():
            if hasattr(module, "layer_idx") and id(module) not in layers:
                self._time(module)

    def measure(self, rounds: int) -> dict[str, Any]:
        """Return medians in milliseconds, and the bytes that a waiting node and a state take."""
        self._run([None, *range(_CONTEXT - 1)], _CONTEXT - 1)
        taken: dict[str, list[float]] = {name: [] for name in ("step", "window", "mixer_step", "mixer_window")}
        for number in range(-2, 8 * rounds):
            arms: dict[str, list[int | None]] = {"step": [None], "window": self._tree()}
            for name, parents in arms.items():
                self._mixer_s = 0.0
                start_s = time.perf_counter()
                self._run(parents, min(_COMMITTED, len(parents)) - 1)
                if number >= 0:
                    taken[name].append(1000 * (time.perf_counter() - start_s))
                    taken[f"mixer_{name}"].append(1000 * self._mixer_s)
        medians = {name: sample(values) for name, values in taken.items()}
        row_bytes, state_bytes = self._memory()
        return {
            "step_ms": medians["step"].median,
            "window_ms": medians["window"].median,
            "ratio": medians["window"].median / medians["step"].median,
            "mixer_ratio": medians["mixer_window"].median / medians["mixer_step"].median,
            "row_bytes": row_bytes,
            "state_bytes": state_bytes,
            "waiting_share": row_bytes / state_bytes if state_bytes else None,
            "samples": medians,
        }

    def _tree(self) -> list[int | None]:
        """Return the parents of a window's nodes, by offset: a chain to commit, and branches from random nodes."""
        chain: list[int | None] = [None, *range(_COMMITTED - 1)]
        return chain + [self._rng.randrange(offset) for offset in range(_COMMITTED, self._num_nodes)]

    def _run(self, parents: list[int | None], committed: int) -> None:
        """Compute new nodes below the text, and commit the path to one of them."""
        first, length = self._next_node, self._table.prefix_length
        self._next_node += len(parents)
        positions: list[int] = []
        for parent in parents:
            positions.append(length if parent is None else positions[parent] + 1)
        names = [None if parent is None else first + parent for parent in parents]
        forward = self._table.append(range(first, self._next_node), names, positions)
        tokens = [self._rng.randrange(_VOCAB) for _ in parents]
        self._model.run([SpanPass(cache=self._cache, forward=forward, inputs=tokens, wanted=range(len(tokens)))])
        for node in (first + committed, None):
            edit = self._table.settle(node)
            if edit is not None:
                self._cache.edit(edit)

    def _time(self, module: Any) -> None:
        started: list[float] = []

        def begin(*_: object) -> None:
            started.append(time.perf_counter())

        def end(*_: object) -> None:
            self._mixer_s += time.perf_counter() - started.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def _memory(self) -> tuple[int, int]:
        """Return the bytes of a waiting node's row and of a state; 0 where nothing recurs."""
        if not isinstance(self._cache, HybridCache):
            return 0, 0
        layer = self._cache.recurrent.layer(0)
        tail = 0 if layer.tail is None else layer.tail.nbytes
        state = 0 if layer.state is None else layer.state.nbytes
        return sum(buffer[0].nbytes for buffer in layer.rows.values()), tail + state


def _one_layer(config: PassConfig, kind: str) -> SpanModel:
    family, _, changes = SHAPES[config.shape]
    dtype = TORCH_DTYPES[compute_format(config.dtype)]
    kinds = {} if kind == "hybrid" else {"layer_types": [kind]}
    shape = CONFIG_MAPPING[family](**changes, **kinds, num_hidden_layers=1, vocab_size=_VOCAB, pad_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    model.to_empty(device="cpu")
    model.initialize_weights()
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(_SEED)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                _fill(parameter.view(-1), block * parameter.shape[-1] ** -0.5)
    loaded = wrap_whole(model, dtype)
    if can_pack(dtype, "cpu"):
        pack_linear_layers(model)
    return SpanModel(loaded, PassOrder.TOGETHER, cache_bytes=1 << 40)


def _fill(values: torch.Tensor, block: torch.Tensor) -> None:
    """Fill a large tensor with random numbers that repeat: how they repeat costs no time in products."""
    for start in range(0, len(values), len(block)):
        part = values[start : start + len(block)]
        part.copy_(block[: len(part)])
