"""Reads a GGUF file's header once, and writes what it says in transformers' format: config, tokenizer, index of tensors."""

import hashlib
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from filelock import FileLock

from dsd_p2p.errors import ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.checkpoints.gguf import INDEX, GgufIndex, GgufTensor
from dsd_p2p.models.progress import Progress

_FORMAT = 1
"""Raise it when what is written changes."""

_PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")

_TOKENS = "tokenizer.ggml.tokens"
_LEFT_OUT = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
"""Fields of a header, and what transformers' config calls them, that its reader leaves out."""

_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_files(path: Path) -> list[Path]:
    """Return `path` and the other parts of the same model.

    Raises:
        ModelError: a part is missing.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    files = [path.with_name(f"{found[1]}-{part:05d}-of-{found[2]}.gguf") for part in range(1, int(found[2]) + 1)]
    for each in files:
        if not each.exists():
            raise ModelError(f"{each} is missing: the model has {len(files)} parts, and all must lie in one folder")
    return files


def prepare_gguf(files: Sequence[Path], progress: Progress) -> Path:
    """Return a folder with the config, the tokenizer and the index of these files; write it if it is not there.

    Raises:
        ModelError: a file is broken, or its family is not supported.
    """
    try:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        state = hashlib.sha256(repr([_FORMAT, stats]).encode()).hexdigest()
        folder = default_cache_dir() / "gguf-headers" / f"{files[0].stem}-{state[:16]}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        # If two processes want it at once, the second waits for the first.
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                progress.step(f"read the header of {files[0].name}", 0, 0)
                staging = folder.with_name(folder.name + ".partial")
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
                _write(files, staging)
                staging.rename(folder)
    except OSError as exc:
        raise ModelError(f"{exc.filename or files[0]}: {exc.strerror or exc}") from exc
    return folder


def _write(files: Sequence[Path], folder: Path) -> None:
    # Imported here because the imports take seconds, and a model that was used before does not need them.
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    main = files[0]
    try:
        readers = [GGUFReader(path) for path in files]
        fields = _fields(readers[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(main, fields, {name for reader in readers for name in _tensor_names(reader)})
            if _TOKENS in readers[0].fields:
                AutoTokenizer.from_pretrained(main.parent, gguf_file=main.name).save_pretrained(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        architecture = str(fields["general.architecture"])
        rules = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(model, rules)
    except ModelError:
        raise
    except Exception as exc:  # its libraries raise errors of many kinds for broken files
        raise ModelError(f"{main}: it cannot be read as a GGUF model: {str(exc).partition(chr(10))[0][:200]}") from exc
    _apply_frequencies(config, readers, main)
    tensors: dict[str, tuple[GgufTensor, ...]] = {}
    for file, reader in zip(files, readers, strict=True):
        for each in reader.tensors:
            # transformers' fused experts have no ".weight" at the end of their names.
            name = names.get(each.name) or names.get(each.name.removesuffix(".weight"))
            if name:
                tensors[name] = tuple(sorted((*tensors.get(name, ()), _tensor(file, each)), key=_order))
    index = GgufIndex(
        architecture=architecture,
        config={name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")},
        tensors=tensors,
    )
    (folder / INDEX).write_bytes(msgspec.json.encode(index))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _order(part: GgufTensor) -> bool:
    """Sort the gate's experts before those of the up projection, as transformers fuses them."""
    return "ffn_up" in part.name


def _tensor(file: Path, found: Any) -> GgufTensor:
    return GgufTensor(
        name=found.name,
        file=file.name,
        kind=int(found.tensor_type),
        shape=tuple(int(size) for size in reversed(found.shape)),
        start=int(found.data_offset),
        num_bytes=int(found.n_bytes),
    )


def _tensor_names(reader: Any) -> list[str]:
    return [each.name for each in reader.tensors]


def _fields(reader: Any) -> Mapping[str, Any]:
    """Return the numbers and words of a header, without its lists, which are the tokenizer's."""
    return {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}


def _config(path: Path, fields: Mapping[str, Any], tensors: set[str]) -> Any:
    """Return transformers' config of the file, with what its reader leaves out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.tie_word_embeddings = "output.weight" not in tensors
    architecture = fields["general.architecture"]
    for field, name in _LEFT_OUT.items():
        told = fields.get(f"{architecture}.{field}")
        if told is not None and getattr(config, name, told) != told:
            setattr(config, name, told)
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "") and architecture != "gpt-oss":
        raise ModelError(f"{path}: it scales its positions ({scaling}), which is not supported in GGUF files")
    return config


def _apply_frequencies(config: Any, readers: Sequence[Any], path: Path) -> None:
    """Let the config say how positions are scaled, where the file says it by a tensor of factors (Llama 3.1 and later).

    Raises:
        ModelError: the factors follow no known rule.
    """
    found = next((each for reader in readers for each in reader.tensors if each.name == _FREQUENCIES), None)
    if found is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factors = torch.from_numpy(np.array(found.data, np.float32))
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **_LLAMA3}
    config.rope_parameters = rope
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-4, atol=0):
        raise ModelError(f"{path}: it scales its positions in an unknown way, which is not supported in GGUF files")
