"""Makes a tiny config that has the structure of a given one, so that its family can be tried in a moment.

How it works. A config is a flat set of numbers. The names say what each number is: a width, a number of heads, a number
of experts. Each kind gets one small value; ratios that select a code path (grouped heads, one head, a head size of its
own, two widths of experts) stay what they are. Lists with one entry per layer keep one layer of each sort.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, HEAD_DIM, VOCAB, WINDOW = 64, 4, 16, 131, 8
_MAX_LAYERS = 8

_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers")
_NUM_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads")
_EXPERTS = r"num_experts|n_routed_experts|num_local_experts|moe_num_experts"
_CHOSEN = r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts"
_SMALL: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|word_embed_proj_dim|embedding_dim", WIDTH),
    (r"hidden_size_per_layer_input", 8),
    (r"(moe|expert|shared|dense)_.*(intermediate|hidden)_size|.*expert.*(intermediate|hidden)_size", 32),
    (r"intermediate_size(_mlp)?|.*ffn_dim|n_inner|dff|ffn_hidden_size", 96),
    (r"head_dim|kv_channels|attention_head_dim|swa_head_dim|d_kv", HEAD_DIM),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"swa_num_attention_heads", HEADS),
    (r"(qk_)?rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_nope_head_dim", HEAD_DIM),
    (r"v_head_dim", HEAD_DIM - 4),
    (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
    (r"swa_v_head_dim", HEAD_DIM - 4),
    (r".*_lora_rank|gated_norm_rank|d_rel", HEAD_DIM),
    (_EXPERTS, 4),
    (_CHOSEN, 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"(n|num)_shared_experts?|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(sliding|attention)_window(_size)?|window_size|local_attention|attention_chunk_size", WINDOW),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"mamba_d_state|ssm_state_size|mamba_chunk_size", HEAD_DIM),
    (r"mamba_dt_rank", 8),
    (r"linear_(key_|value_)?head_dim", HEAD_DIM),
    (r"linear_num_heads", HEADS),
    (r"index_topk", 4),
    (r"index_(n_heads|head_dim)", HEAD_DIM),
)
"""Patterns of names and the value that stands in for every larger one."""


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of the same class with a few thousand weights.

    Raises:
        Exception: whatever the config's own class says about the smaller numbers.
    """
    values = config.to_dict()
    for name in ("quantization_config", "dtype", "torch_dtype", "architectures", "_name_or_path", "attention_layers"):
        values.pop(name, None)
    num_layers = int(config.num_hidden_layers)
    kept = _layers_to_keep(values, num_layers, getattr(config, "layer_types", None))
    small = {name: _shrunk(name, value, num_layers, kept) for name, value in values.items()}
    if small.get("per_layer_config"):
        small["per_layer_config"] = _shrunk_layers(values["per_layer_config"], num_layers, kept)
    for name in _NUM_LAYERS:
        if name in small:
            small[name] = len(kept)
    if "moe_layer_end_index" in small:
        small["moe_layer_end_index"] = len(kept) - 1
    _shrink_heads(values, small)
    _shrink_recurrence(values, small)
    _keep_impossible_choice(values, small)
    if "qk_rope_head_dim" in small and small.get("head_dim"):
        # Latent attention rotates a part of its own size, which some families also call head_dim.
        small["head_dim"] = small["qk_rope_head_dim"]
    if isinstance(small.get("rope_parameters"), Mapping):
        small["rope_parameters"] = _shrunk_rope(small["rope_parameters"], int(small.get("head_dim") or HEAD_DIM))
    return type(config).from_dict(small)


def _layers_to_keep(values: Mapping[str, Any], num_layers: int, kinds: Any) -> list[int]:
    """Return two layers of each sort if there are few sorts, else the first of each, in order.

    kinds: of each layer; some families derive them from other fields.
    """
    if "attn_layer_period" in values:
        # A layer's sort follows from its index, so layers in between cannot be left out.
        return list(range(min(num_layers, _MAX_LAYERS)))
    lists = [value for value in (*values.values(), kinds) if isinstance(value, list) and len(value) == num_layers]
    sorts: dict[str, list[int]] = {}
    for layer in range(num_layers):
        sorts.setdefault(repr([each[layer] for each in lists]), []).append(layer)
    num_each = 2 if len(sorts) * 2 <= _MAX_LAYERS // 2 else 1
    kept = sorted(layer for layers in sorts.values() for layer in layers[:num_each])[:_MAX_LAYERS]
    # Two at least, so that the trial can part them: the only layer twice if need be.
    return kept if len(kept) >= 2 else [0, min(1, num_layers - 1)]


def _shrunk(name: str, value: Any, num_layers: int, kept: list[int]) -> Any:
    if isinstance(value, list) and len(value) == num_layers:
        return [_shrunk(name, value[layer], num_layers, kept) for layer in kept]
    if name in ("mlp_only_layers", "moe_layers", "no_rope_layers", "attn_layer_indices") and isinstance(value, list):
        return [kept.index(layer) for layer in value if layer in kept]
    if name == "attention_types":
        return [[kinds, 1] for kinds, _ in value]
    if name.endswith("_token_id") and isinstance(value, int | list):
        return {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0)
    if name.endswith("_token_id") or isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in _SMALL:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _shrunk_layers(layers: Mapping[Any, Mapping[str, Any]], num_layers: int, kept: list[int]) -> dict[str, Any]:
    """Shrink the values that differ by layer, for the layers that are kept."""
    small = {}
    for key, values in layers.items():
        if int(key) in kept:
            own = {name: _shrunk(name, value, num_layers, kept) for name, value in values.items()}
            _shrink_heads(values, own)
            small[str(kept.index(int(key)))] = own
    return small


def _shrink_heads(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    num_heads = 0
    for name in _NUM_HEADS:
        if values.get(name):
            num_heads, small[name] = int(values[name]), HEADS
    for name in ("num_key_value_heads", "num_kv_heads", "num_query_groups", "swa_num_key_value_heads"):
        if values.get(name):
            small[name] = HEADS if values[name] == num_heads else min(int(values[name]), HEADS // 2)


def _shrink_recurrence(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Give recurrent layers a few small heads: as many as fill the width that they work in."""
    for heads, size in (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim")):
        if values.get(heads):
            small[heads] = 2 * HEADS
            small[size] = int(values.get("mamba_expand") or 2) * WIDTH // small[heads]
    for name in ("mamba_n_groups", "n_groups"):
        if values.get(name):
            small[name] = min(int(values[name]), 2)
    if values.get("mamba_d_ssm"):
        small["mamba_d_ssm"] = small["mamba_n_heads"] * small["mamba_d_head"]
    if values.get("linear_num_key_heads"):
        small["linear_num_key_heads"] = 2
        small["linear_num_value_heads"] = 2 * (1 + (values["linear_num_value_heads"] > values["linear_num_key_heads"]))


def _keep_impossible_choice(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Let a config that chooses more experts than it has fail as a small one, too."""
    experts = [name for name in values if re.fullmatch(_EXPERTS, name) and values[name]]
    chosen = [name for name in values if re.fullmatch(_CHOSEN, name) and isinstance(values[name], int)]
    for name in chosen if experts else ():
        if values[name] > values[experts[0]]:
            small[name] = small[experts[0]] + 1


def _shrunk_rope(rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Cut lists that have one number per frequency to the new number of frequencies."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _shrunk_rope(value, head_dim)
        elif name.endswith("_factor") and isinstance(value, list):
            small[name] = value[: int(head_dim * (rope.get("partial_rotary_factor") or 1)) // 2]
        elif name == "mrope_section":
            small[name] = [head_dim // 2 - 2 * (head_dim // 8), head_dim // 8, head_dim // 8]
        else:
            small[name] = value
    return small
