"""Reads the properties of a decoder model that differ between families, from its config and not from a table.

Other modules ask here what a config means. `.shrink` copies its fields, and `.loader` changes a few for a span.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import msgspec
from transformers import AutoConfig

from dsd_p2p.errors import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"

RECURRENT = ("linear_attention", "conv", "hybrid")
"""Kinds of layers that keep a state or the last inputs of a convolution; hybrid ones attend as well."""

WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp")
"""Kinds of layers that keep no keys and values."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies change when the text gets longer than the original limit. Up to it they do not."""

_MAX_LAYERS, _MAX_WIDTH, _MAX_VOCAB, _MAX_POSITIONS = 4096, 1 << 20, 1 << 24, 1 << 30
"""Far above any model. A larger number in a config is a mistake."""

_MAX_REASON = 200
"""Characters of transformers' reason that an error shows."""


class _QuantisedConfig(msgspec.Struct):
    quantization_config: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    text_config: "_QuantisedConfig | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer.

    kind: the name of its sort of attention or recurrence. window: how many positions it attends to, itself included; 0 for all.
    kv_values: how many numbers it keeps in the KV cache for one position.
    """

    kind: str
    window: int
    kv_values: int

    @property
    def attends(self) -> bool:
        """True if it keeps keys and values."""
        return self.kind not in WITHOUT_ATTENTION

    @property
    def is_recurrent(self) -> bool:
        """True if it keeps a state, or the last inputs of a convolution."""
        return self.kind in RECURRENT


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a model.

    has_slot_masks: its layers also mask by slot, as GPT-Neo's do (`dsd_p2p.models.layer_masks`).
    """

    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerShape, ...]
    has_slot_masks: bool = False

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @cached_property
    def is_recurrent(self) -> bool:
        """True if some of its layers are recurrent."""
        return any(layer.is_recurrent for layer in self.layers)

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of attention of each layer."""
        return [layer.kind for layer in self.layers]


def read_model_config(folder: Path) -> Any:
    """Return transformers' config of the text model in `folder`.

    Raises:
        ModelError: the folder has no config, or the model cannot be split or rolled back.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = config.get_text_config(decoder=True)
    except Exception as exc:  # transformers' classes can fail in any way on what a file can hold.
        raise ModelError(f"{folder}: transformers cannot read its config.json: {_first_line(exc)}") from exc
    # It tells how the weights are stored; the model itself is built with floats.
    config.__dict__.pop("quantization_config", None)
    try:
        check_config(config)
        shape_of(config)
    except ModelError as exc:
        raise ModelError(f"{folder}: {exc}") from exc
    return config


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """Return what the config in `folder` says of quantised weights, or None if they are floats.

    Raises:
        ModelError: there is no config, or the weights are MLX's.
    """
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=_QuantisedConfig)
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelError(f"{folder / 'config.json'}: {exc}: fetch the model again") from exc
    if config.quantization and not config.quantization_config:
        raise ModelError(
            f"{folder}: its weights are quantised for MLX, which is not supported: take a GGUF file or another checkpoint"
        )
    inner = config.text_config or _QuantisedConfig()
    return config.quantization_config or inner.quantization_config or None


def check_config(config: Any) -> None:
    """Refuse what cannot be split or rolled back.

    Raises:
        ModelError: says what.
    """
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{family} is an encoder-decoder; only decoders can be split")
    if not getattr(config, "num_hidden_layers", None) or not getattr(config, "vocab_size", None):
        raise ModelError(f"{family} is not a decoder language model")
    unknown = set(_kinds(config)) - {FULL, SLIDING, *RECURRENT, *WITHOUT_ATTENTION}
    if unknown:
        raise ModelError(f"{family}: attention of kind {', '.join(sorted(unknown))} is not supported")
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise ModelError(f"{family}: bidirectional attention is not supported")
    if getattr(config, "alibi", False):
        raise ModelError(f"{family}: attention biases by distance (ALiBi) are not supported")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"{family}: layers that share keys and values are not supported")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ModelError(f"{family}: embeddings for every layer (Gemma's E models) are not supported")
    kept = getattr(config, "keep_window_size", None)
    if kept is not None and kept < _number(config, "max_position_embeddings", _MAX_POSITIONS):
        # Which ones are kept is not defined: in the first layer, equal tokens are equally important.
        raise ModelError(f"{family}: layers that attend to only the {kept} most important positions are not supported")


def read_shape(folder: Path) -> ModelShape:
    """Return the dimensions of the model in `folder`; raises the errors of `read_model_config`."""
    return shape_of(read_model_config(folder))


def shape_of(config: Any) -> ModelShape:
    """Return the dimensions of the model with this config.

    Raises:
        ModelError: the config lacks one, or its value makes no sense.
    """
    num_layers = _number(config, "num_hidden_layers", _MAX_LAYERS)
    kinds = _kinds(config)
    if len(kinds) != num_layers:
        raise ModelError(f"{config.model_type}: layer_types names {len(kinds)} layers, num_hidden_layers {num_layers}")
    layers = (
        LayerShape(
            kind=kind,
            window=_number(config, _WINDOW_NAMES, _MAX_POSITIONS) if kind == SLIDING else 0,
            kv_values=_kv_values(config, layer, kind),
        )
        for layer, kind in enumerate(kinds)
    )
    return ModelShape(
        hidden_size=_number(config, "hidden_size", _MAX_WIDTH),
        vocab_size=_number(config, "vocab_size", _MAX_VOCAB),
        max_positions=_max_positions(config),
        layers=tuple(layers),
        has_slot_masks=isinstance(getattr(config, "attention_layers", None), list),
    )


def _max_positions(config: Any) -> int:
    """Return how long a text may be. Rolling a token back must not change the frequencies of the others."""
    longest = _number(config, "max_position_embeddings", _MAX_POSITIONS)
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original: Any = each.get("original_max_position_embeddings")
            longest = min(longest, int(original or getattr(config, "original_max_position_embeddings", longest)))
    return longest


_WINDOW_NAMES = ("sliding_window", "window_size")


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return list(kinds)
    if isinstance(own := getattr(config, "attention_layers", None), list):
        # GPT-Neo's names.
        return [{"global": FULL, "local": SLIDING}.get(kind, str(kind)) for kind in own]
    has_window = getattr(config, "sliding_window", None) is not None
    return [SLIDING if has_window else FULL] * int(config.num_hidden_layers)


def _kv_values(config: Any, layer: int, kind: str) -> int:
    """Return how many keys and values this layer stores for one position."""
    if kind in WITHOUT_ATTENTION:
        return 0
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent) + int(config.qk_rope_head_dim)
    num_heads = _number(config, "num_attention_heads", _MAX_WIDTH)
    own = getattr(config, "per_layer_config", None)
    at = own[layer] if own else config
    num_kv_heads = getattr(at, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or num_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        num_kv_heads = 1
    head_dim = getattr(at, "head_dim", None) or getattr(config, "kv_channels", None)
    if not head_dim:
        head_dim = _number(config, "hidden_size", _MAX_WIDTH) // num_heads
    value_dim = getattr(at, "v_head_dim", None) or head_dim
    if kind == SLIDING and getattr(config, "swa_head_dim", None):
        num_kv_heads, head_dim = config.swa_num_key_value_heads, config.swa_head_dim
        value_dim = getattr(config, "swa_v_head_dim", None) or head_dim
    return int(num_kv_heads) * (int(head_dim) + int(value_dim))


def _number(config: Any, names: str | tuple[str, ...], greatest: int) -> int:
    """Return the first of these fields that the config has."""
    names = (names,) if isinstance(names, str) else names
    value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    if value is None:
        raise ModelError(f"{config.model_type} is not supported: its config has no {names[0]}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= greatest:
        raise ModelError(f"{config.model_type}: its config says {names[0]} is {value}: expected 1 to {greatest}")
    return value


def _first_line(exc: Exception) -> str:
    """Return what an exception says, in one line of bearable length."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [repr(exc)]
    # The first line of a strict dataclass's error only names the class.
    line = lines[-1] if isinstance(exc, huggingface_hub.errors.StrictDataclassError) else lines[0]
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}…"
