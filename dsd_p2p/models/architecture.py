"""Reads the properties of a decoder model that differ between families, from its config and not from a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dsd_p2p.errors import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the longest text so far, so rolling back a token would not restore them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a model.

    kv_values_per_slot: how many numbers one layer keeps in the KV cache for one position.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    kv_values_per_slot: int


def read_model_config(folder: Path) -> Any:
    """Return transformers' config of the text model in `folder`.

    Raises:
        ModelError: the folder has no config, or the model cannot be split or rolled back.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        first_line = str(exc).strip().partition("\n")[0]
        raise ModelError(f"{folder}: transformers cannot load this model: {first_line}") from exc
    config = getattr(config, "text_config", None) or config
    if not getattr(config, "num_hidden_layers", None) or not getattr(config, "vocab_size", None):
        raise ModelError(f"{folder}: {config.model_type} is not a decoder language model")
    if config.is_encoder_decoder:
        raise ModelError(f"{folder}: {config.model_type} is an encoder-decoder; only decoders can be split")
    unknown = set(attention_kinds(config)) - {FULL, SLIDING}
    if unknown:
        raise ModelError(f"{folder}: attention of kind {', '.join(sorted(unknown))} is not supported")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(f"{folder}: bidirectional attention is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        raise ModelError(f"{folder}: rope of type {rope['rope_type']} is not supported")
    return config


def read_shape(folder: Path) -> ModelShape:
    """Return the dimensions of the model in `folder`; raises the errors of `read_model_config`."""
    return shape_of(read_model_config(folder))


def attention_kinds(config: Any) -> list[str]:
    """Return the kind of attention of each layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return list(kinds)
    has_window = getattr(config, "sliding_window", None) is not None
    return [SLIDING if has_window else FULL] * int(config.num_hidden_layers)


def shape_of(config: Any) -> ModelShape:
    """Return the dimensions of the model with this config."""
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    return ModelShape(
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        kv_values_per_slot=2 * num_kv_heads * head_dim,
    )
