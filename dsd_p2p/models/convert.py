"""Converts GGUF to safetensors, once. The dequantised float32 weights define the model for all comparisons."""

import shutil
import warnings
from pathlib import Path

from safetensors.torch import save_file

from dsd_p2p.errors import ModelError
from dsd_p2p.models.progress import Progress


def convert_gguf(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write the config, tokenizer and `model.safetensors` of `gguf` to `folder`. If it fails, `folder` is not created.

    Raises:
        ModelError: transformers cannot read the file.
    """
    # Imported here because the import takes seconds, and a cached model does not need it.
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    progress.step(f"convert {gguf.stem}", 0, 0)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise ModelError(f"{gguf}: transformers cannot read it: {exc}") from exc
    model.config.__dict__.pop("quantization_config", None)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(staging)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(folder)
