"""Implements `dsd quantize`: write a copy of a model whose int8 form is close to the model."""

import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_model_config, read_shape
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.formats import REPORT
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.lean.products import round_channels
from dsd_p2p.models.lean.quality import judge, log_probabilities
from dsd_p2p.models.lean.smoothing import STRENGTH, smooth
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Span
from node.config import QuantizeConfig
from node.console import ConsoleProgress
from node.lab.quality.texts import FITTED, JUDGED, texts_of

_WEIGHTS = "model.safetensors"
_MATRIX = 2
_COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "int-quantized",
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            }
        },
    }
}
_COPIED = (".json", ".jinja", ".model", ".txt")


def run(config: QuantizeConfig) -> int:
    """Write the folder and its report, print the report, and return the exit code."""
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"--output {output}: it exists; choose a new folder")
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        source.fetch(source.weights.names, progress)
        report = quantize(source, output, progress)
    print(json.dumps(report, indent=1))
    print(f"run it: dsd up --model {output} --weights int8")
    return 0


def quantize(source: ModelSource, output: Path, progress: Progress) -> dict[str, object]:
    """Write the model with smoothed weights to `output` and return the report.

    Raises:
        ModelError: the family has no int8 form.
    """
    whole = Span(0, read_shape(source.folder).num_layers)
    # A family without an int8 form is refused before minutes are spent on it.
    open_lean_span(source, Span(0, 1))
    stock = SpanModel(
        load_span(source, whole, torch.float32, "cpu"),
        pass_order(read_model_config(source.folder)),
        cache_bytes=1 << 40,
    )
    codec = TextCodec(source.folder)
    progress.step("what the float32 model says", 0, 0)
    judged = texts_of(stock, codec, JUDGED)
    expected = [log_probabilities(stock, text) for text in judged]
    fitted = texts_of(stock, codec, FITTED)
    progress.step("smooth", 0, 0)
    smooth(stock, fitted)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / output.name
        _write(stock, source, folder)
        del stock
        reports = {}
        for name, each in (("before", source), ("after", find_model(str(folder), progress))):
            progress.step(f"int8 {name} smoothing", 0, 0)
            reports[name] = judge(open_lean_span(each, whole, cache_bytes=1 << 40), judged, expected)
        report: dict[str, object] = {
            "model": source.name,
            "digest": source.digest(),
            "strength": STRENGTH,
            "fitted_on": msgspec.to_builtins(FITTED),
            "judged_on": msgspec.to_builtins(JUDGED),
            "int8_before": msgspec.to_builtins(reports["before"]),
            "int8": msgspec.to_builtins(reports["after"]),
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1))
        folder.rename(output)
    return report


def _write(stock: SpanModel, source: ModelSource, folder: Path) -> None:
    """Write the model in the format of compressed-tensors, and what belongs to its tokenizer as it is.

    The layers' matrices are int8 with a scale for each output channel, as they are in memory. The embedding and the head
    are bfloat16.
    """
    folder.mkdir(parents=True)
    for file in source.folder.iterdir():
        if file.suffix in _COPIED and not file.name.endswith("index.json"):
            shutil.copy2(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32", **_COMPRESSED}, indent=1))
    state: dict[str, Tensor] = {}
    for name, tensor in stock.model.state_dict().items():
        if tensor.ndim < _MATRIX:
            state[name] = tensor.contiguous()
        elif ".layers." in name:
            state[name], scales = round_channels(tensor)
            state[f"{name}_scale"] = scales[:, None].contiguous()
        elif name != "lm_head.weight" or not stock.model.config.tie_word_embeddings:
            state[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
