"""Writes tiny GGUF files as llama.cpp's converter does, in any of its formats."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

VOCAB, HIDDEN, NUM_LAYERS = 160, 256, 2

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, head_dim=64),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=128),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=64, query_pre_attn_scalar=64, sliding_window=512),
}
MOE = "qwen3moe"
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
_ADD_ONE = ("gemma3",)
_BLOCKS = 256


def quantised(weight: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Return the weight's bytes. Formats that the library cannot write get blocks of random numbers of a like size."""
    try:
        return gguf.quantize(weight, kind)
    except NotImplementedError:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (weight.size // gguf.GGML_QUANT_SIZES[kind][0], block_bytes), dtype=np.uint8)
        scale = np.array([0.002, 0.03], np.float16).view(np.uint8)
        if kind is gguf.GGMLQuantizationType.Q6_K:
            blocks[:, -2:] = scale[:2]
            blocks[:, -18:-2] &= 15
        else:
            blocks[:, :4] = scale
        return blocks.reshape(len(weight), -1)


def write_gguf(path: Path, family: str, kind: gguf.GGMLQuantizationType, seed: int = 0, **fields: object) -> Path:
    """Write a random model whose matrices are in `kind`. fields: more numbers and words of the header."""
    config = Qwen3MoeConfig(**_SHAPE, head_dim=128, **_EXPERTS) if family == MOE else CONFIGS[family]()
    config.initializer_range = 0.08
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    head_dim = getattr(config, "head_dim", None) or HIDDEN // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if family == MOE:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{family}.{name.replace('__', '.')}", value)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, NUM_LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            _add_experts(writer, name, tensor.numpy(), kind, rng)
            continue
        stem, _, suffix = name.rpartition(".")
        weight = tensor.numpy().copy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            # llama.cpp lets the halves of each head alternate.
            heads = len(weight) // head_dim
            weight = weight.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 1:
            weight += 0.1 * rng.standard_normal(weight.shape).astype(np.float32)
            if family in _ADD_ONE:
                weight += 1
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", quantised(weight, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_experts(
    writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator
) -> None:
    """Write fused experts as llama.cpp has them: the gate and the up projection apart."""
    layer = name.split(".")[2]
    halves = np.split(weight, 2, axis=1) if "gate_up" in name else [weight]
    for part, values in zip(("gate", "up") if "gate_up" in name else ("down",), halves, strict=True):
        data = quantised(np.ascontiguousarray(values).reshape(-1, values.shape[-1]), kind, rng)
        writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", data.reshape(*values.shape[:2], -1), raw_dtype=kind)
