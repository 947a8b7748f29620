"""Tiny random models of every family that must work, saved as transformers saves them."""

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

VOCAB = 131
NUM_LAYERS = 4

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_NEOX = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

_MIX = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": _MIX,
}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 16}
_MAMBA_1 = {
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}

RECURRENT = {
    "qwen3-next": lambda: transformers.Qwen3NextConfig(**_SHAPE, **_DELTA, **_MOE, shared_expert_intermediate_size=32),
    "kimi-linear": lambda: transformers.KimiLinearConfig(
        **_SHAPE | _LATENT,
        layer_types=_MIX,
        linear_num_heads=4,
        linear_head_dim=16,
        linear_conv_kernel_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "granite-h": lambda: transformers.GraniteMoeHybridConfig(
        **_SHAPE,
        **_MAMBA_2,
        layer_types=_MIX,
        shared_intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(**_SHAPE, **_MAMBA_2, head_dim=16, mamba_d_ssm=128),
    "jamba": lambda: transformers.JambaConfig(**_SHAPE, **_MAMBA_1, num_experts=4),
    "lfm2": lambda: transformers.Lfm2Config(
        **_SHAPE, conv_L_cache=3, layer_types=["conv", "full_attention", "conv", "conv"]
    ),
}
"""One family for each sort of recurrent layer. The others are in tests/models/test_trials.py."""

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "qwen2-sliding": lambda: transformers.Qwen2Config(**_SHAPE, **_WINDOW, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SHAPE,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma2-eager": lambda: transformers.Gemma2Config(
        **_SHAPE, head_dim=16, sliding_window=8, query_pre_attn_scalar=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**_SHAPE, **_MOE, mlp_only_layers=[2]),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_NEOX),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=1024,
        n_embd=64,
        n_layer=NUM_LAYERS,
        n_head=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "granite": lambda: transformers.GraniteConfig(**_SHAPE, embedding_multiplier=3.0, logits_scaling=2.0),
    **RECURRENT,
}


def save_tiny_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Weights are scaled up so that the text depends on every token and does not fall into a loop at once."""
    config: PreTrainedConfig = FAMILIES[family]()
    config.initializer_range = 0.15
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
