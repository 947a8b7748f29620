"""Builds the stock transformers model with only one span of its layers, and reads only that span's tensors.

How it works. The model is built on the `meta` device with all its layers, so every layer keeps its real index. Modules
outside the span are replaced with ones that do nothing before any memory is allocated. transformers' own conversion
rules (5.23; they are internal, hence the pin) map the checkpoint's names, so they handle fused experts, renamed heads
and missing prefixes.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import ModelShape, read_model_config, shape_of
from dsd_p2p.models.device import check_device
from dsd_p2p.models.layer_masks import mask_by_layer
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import Span

_TEXT_TOWER_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"^model\.language_model\.": "model.",
}
"""The names that multimodal checkpoints use for their text model. A text-only checkpoint has none of these."""


_IGNORED_TENSORS = (r"rotary_emb\.inv_freq$", r"\.(attn|attention|self_attn)\.(masked_)?bias$")
"""Buffers that old checkpoints stored and that the model computes itself."""


class _PassThrough(nn.Module):
    """A replacement for a layer, embedding, norm or head that another stage holds."""

    def forward(self, hidden: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        return hidden


class _NoPositions(nn.Module):
    """A replacement for GPT-2's position embedding in stages after the head."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The names that a model family uses for its parts, found in the model itself."""

    prefix: str
    layers: str
    embedding: str
    norm: str
    position_embedding: str | None
    head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpan:
    """transformers' causal language model, in evaluation mode, holding only `span`.

    stored_as: the checkpoint's name of each tensor that was read, by the whole model's name of it.
    """

    model: Any
    span: Span
    shape: ModelShape
    dtype: torch.dtype
    parts: _Parts
    stored_as: Mapping[str, str]

    def layer_name(self, index: int) -> str:
        """Return the whole model's name of layer `index`, with a dot at its end."""
        return f"{self.parts.prefix}.{self.parts.layers}.{index}."

    @property
    def embedding_name(self) -> str:
        """The whole model's name of the embedding's weight."""
        return f"{self.parts.prefix}.{self.parts.embedding}.weight"

    def narrow(self, span: Span) -> "LoadedSpan":
        """Return a model of part of the layers that shares every tensor with this one.

        Raises:
            ConfigError: the part is not inside this span.
        """
        if not self.span.first <= span.first < span.last <= self.span.last:
            raise ConfigError(f"layers {span} are not inside {self.span}")
        model, base = copy.copy(self.model), copy.copy(self.model.base_model)
        for module in (model, base):
            module._modules = dict(module._modules)
        setattr(model, self.parts.prefix, base)
        model.config = base.config = copy.deepcopy(self.model.config)
        kept = list(getattr(base, self.parts.layers))[span.first - self.span.first : span.last - self.span.first]
        setattr(base, self.parts.layers, nn.ModuleList(kept))
        _drop_ends(model, self.parts, is_head=span.first == 0, is_tail=span.last == self.shape.num_layers)
        if span.first > 0:
            setattr(base, self.parts.embedding, _PassThrough())
        _name_layers(model.config, span, self.shape)
        return replace(self, model=model, span=span)


def load_span(
    source: ModelSource, span: Span, dtype: torch.dtype, device: str, donor: LoadedSpan | None = None
) -> LoadedSpan:
    """Load the tensors of `span`; take layers that `donor` holds from it, without reading them again.

    Raises:
        ConfigError: the span is outside the model, or torch has no such device.
        ModelError: the checkpoint lacks tensors, does not fit the architecture, or is not what its manifest says.
    """
    check_device(device)
    transformers_logging.disable_progress_bar()
    config = read_model_config(source.folder)
    shape = shape_of(config)
    num_layers = shape.num_layers
    if not 0 <= span.first < span.last <= num_layers:
        raise ConfigError(f"span {span} is outside the model's layers [0, {num_layers})")
    model = _build(config, dtype)
    parts = _find_parts(model, num_layers)
    mapping = get_model_conversion_mapping(model, key_mapping=_TEXT_TOWER_NAMES)
    given = range(max(span.first, donor.span.first), min(span.last, donor.span.last)) if donor else range(0)
    target_of = _wanted_tensors(source, model, parts, span, mapping, given)
    wanted = list(target_of)
    source.check(wanted)
    _drop_what_others_own(model, parts, span, num_layers)
    for index in given:
        assert donor is not None
        getattr(model.base_model, parts.layers)[index] = getattr(donor.model.base_model, donor.parts.layers)[
            index - donor.span.first
        ]
    missing = _load(model, source, wanted, mapping, dtype, device)
    is_tail, tied = span.last == num_layers, bool(model.all_tied_weights_keys)
    if is_tail and tied:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if span.first > 0:
            setattr(model.base_model, parts.embedding, _PassThrough())
    _keep_layers(model, parts, span)
    # While the config still names all layers: some families initialise a layer by its index.
    _fill_buffers(model, device)
    _name_layers(model.config, span, shape)
    if shape.has_slot_masks:
        mask_by_layer(getattr(model.base_model, parts.layers), shape.kinds[span.first : span.last])
    model.requires_grad_(False)
    return LoadedSpan(model=model, span=span, shape=shape, dtype=dtype, parts=parts, stored_as=_inverted(target_of))


def wrap_whole(model: Any, dtype: torch.dtype) -> LoadedSpan:
    """Return a model of transformers that is in memory already as a span of all its layers; raises ModelError."""
    shape = shape_of(model.config)
    parts = _find_parts(model, shape.num_layers)
    return LoadedSpan(model=model, span=Span(0, shape.num_layers), shape=shape, dtype=dtype, parts=parts, stored_as={})


def load_whole(source: ModelSource, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Return transformers' own unsplit model, in evaluation mode.

    Raises:
        ModelError: see `load_span`.
    """
    num_layers = shape_of(read_model_config(source.folder)).num_layers
    return load_span(source, Span(0, num_layers), dtype, device).model


def num_weights(source: ModelSource) -> int:
    """Return how many weights the model has, whatever format they are stored in.

    Raises:
        ModelError: the family is not supported.
    """
    model = _build(read_model_config(source.folder), torch.float32)
    return sum(each.numel() for each in model.parameters())


def head_layers(source: ModelSource) -> float:
    """Return how many layers have as many weights as the LM head.

    Raises:
        ModelError: the family is not supported.
    """
    config = read_model_config(source.folder)
    num_layers = shape_of(config).num_layers
    model = _build(config, torch.float32)
    layers = getattr(model.base_model, _find_parts(model, num_layers).layers)
    size = sum(each.numel() for each in layers.parameters()) / num_layers
    return float(model.get_output_embeddings().weight.numel() / max(1.0, size))


def tensors_of(source: ModelSource, span: Span) -> list[str]:
    """Return the checkpoint's names of the tensors that `span` needs.

    Raises:
        ConfigError: the span is outside the model.
        ModelError: the family is not supported.
    """
    config = read_model_config(source.folder)
    num_layers = shape_of(config).num_layers
    if not 0 <= span.first < span.last <= num_layers:
        raise ConfigError(f"span {span} is outside the model's layers [0, {num_layers})")
    model = _build(config, torch.float32)
    mapping = get_model_conversion_mapping(model, key_mapping=_TEXT_TOWER_NAMES)
    return list(_wanted_tensors(source, model, _find_parts(model, num_layers), span, mapping, range(0)))


def _inverted(target_of: Mapping[str, str]) -> dict[str, str]:
    """Return the only tensor that each target is made of; experts are made of many and left out."""
    count = Counter(target_of.values())
    return {target: name for name, target in target_of.items() if count[target] == 1}


def _build(config: Any, dtype: torch.dtype) -> Any:
    """Return the whole model without memory for its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as exc:  # A config that fits no model can fail anywhere in the family's own code.
        reason = str(exc).strip().partition("\n")[0] or repr(exc)
        raise ModelError(f"{config.model_type}: transformers cannot build a model from its config: {reason}") from exc


def _find_parts(model: Any, num_layers: int) -> _Parts:
    family = model.config.model_type
    base = model.base_model
    children = dict(base.named_children())
    layers = next((k for k, m in children.items() if isinstance(m, nn.ModuleList) and len(m) == num_layers), None)
    embedding = next((k for k, m in children.items() if m is base.get_input_embeddings()), None)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if layers is None or embedding is None or head is None:
        raise ModelError(f"{family}: this model family is not supported, because its layers have an unusual order")
    norms = [
        name for name in children if ("norm" in name or name.startswith("ln_")) and name not in (layers, embedding)
    ]
    with_weights = [name for name, module in children.items() if next(module.parameters(), None) is not None]
    others = [name for name in with_weights if name not in (layers, embedding, *norms)]
    if len(norms) != 1 or others not in ([], ["wpe"]):
        raise ModelError(
            f"{family}: this model family is not supported, because it is not known which stage needs "
            f"{', '.join([*norms, *others]) or 'its last norm'}"
        )
    return _Parts(
        prefix=model.base_model_prefix,
        layers=layers,
        embedding=embedding,
        norm=norms[0],
        position_embedding=others[0] if others else None,
        head=head,
    )


def _wanted_tensors(
    source: ModelSource, model: Any, parts: _Parts, span: Span, mapping: Any, given: range
) -> dict[str, str]:
    """Return the checkpoint names of the tensors that this span needs, except those of the `given` layers.

    Each with the name of the model's tensor that it belongs to.
    """
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    layers_prefix = f"{parts.prefix}.{parts.layers}."
    embedding_prefixes = tuple(f"{parts.prefix}.{n}." for n in (parts.embedding, parts.position_embedding) if n)
    tied_to = set(model.all_tied_weights_keys.values())
    num_layers = len(getattr(model.base_model, parts.layers))
    is_head, is_tail = span.first == 0, span.last == num_layers
    owners = {name.rpartition(".")[0] for name in state} | {f"{layers_prefix}{layer}" for layer in range(num_layers)}
    ignored = [*_IGNORED_TENSORS, *(model._keys_to_ignore_on_load_unexpected or ())]
    wanted = {}
    for name in source.weights.names:
        target, _ = rename_source_key(name, renamings, converters, parts.prefix, state)
        if target not in state:
            if not any(re.search(pattern, each) for pattern in ignored for each in (name, target)):
                _refuse_of_ours(source, name, target, owners)
            continue
        if target.startswith(layers_prefix):
            layer = int(target.removeprefix(layers_prefix).partition(".")[0])
            is_wanted = span.first <= layer < span.last and layer not in given
        elif target.startswith(embedding_prefixes):
            is_wanted = is_head or (is_tail and target in tied_to)
        else:
            is_wanted = is_tail
        if is_wanted:
            wanted[name] = target
    return wanted


def _refuse_of_ours(source: ModelSource, name: str, target: str, owners: set[str]) -> None:
    """Raise ModelError for a tensor that belongs to one of the model's modules but has no place there.

    The scale of a quantised weight is one. Tensors of other modules, such as an image tower's, are not ours.
    """
    owner = target
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in owners:
            raise ModelError(
                f"weights of {source.name}: the model has no place for {name}; if the checkpoint is quantised, its config "
                "does not say how: take another one"
            )


def _drop_what_others_own(model: Any, parts: _Parts, span: Span, num_layers: int) -> None:
    base = model.base_model
    is_head, is_tail = span.first == 0, span.last == num_layers
    layers = getattr(base, parts.layers)
    for index in range(num_layers):
        if not span.first <= index < span.last:
            layers[index] = _PassThrough()
    if not is_head and not (is_tail and model.all_tied_weights_keys):
        setattr(base, parts.embedding, _PassThrough())
    _drop_ends(model, parts, is_head=is_head, is_tail=is_tail)


def _drop_ends(model: Any, parts: _Parts, *, is_head: bool, is_tail: bool) -> None:
    """Drop the modules before the first and after the last layer, except the embedding: a tail may be tied to it."""
    base = model.base_model
    if not is_head and parts.position_embedding:
        setattr(base, parts.position_embedding, _NoPositions())
    if not is_head and hasattr(base, "embedding_multiplier"):
        # Granite scales its input, but only the head's input is an embedding. So does AFMoE.
        base.embedding_multiplier = 1.0
    if not is_head and getattr(base.config, "mup_enabled", False):
        base.config.mup_enabled = False
    if not is_tail:
        setattr(base, parts.norm, _PassThrough())
        model.set_submodule(parts.head, _PassThrough())


def _load(model: Any, source: ModelSource, wanted: list[str], mapping: Any, dtype: torch.dtype, device: str) -> Any:
    """Fill the model from the checkpoint; return transformers' list of missing keys."""
    settings = LoadStateDictConfig(dtype=dtype, weight_mapping=mapping, device_map={"": device})
    try:
        with source.weights.opened(wanted) as tensors:
            _refuse_8_bits(source, tensors)
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings, None)
    except (SafetensorError, OSError, RuntimeError) as exc:
        raise ModelError(f"weights of {source.name}: {exc}") from exc
    problems = [f"{name} is not expected" for name in info.unexpected_keys]
    problems += [f"{name} is {list(found)}, expected {list(wanted)}" for name, found, wanted in info.mismatched_keys]
    problems += [str(reason).strip().partition("\n")[0] for reason in info.conversion_errors.values()]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    tied = set(model.all_tied_weights_keys)
    problems += [f"{name} is missing" for name in missing if name not in tied]
    if problems:
        raise ModelError(f"weights of {source.name} do not fit its config: {', '.join(map(str, problems[:3]))}")
    return info.missing_keys


def _refuse_8_bits(source: ModelSource, tensors: Mapping[str, Any]) -> None:
    """Raise ModelError for numbers of 8 bits that stand alone: they mean nothing without a scale."""
    for name, tensor in tensors.items():
        dtype = tensor.get_dtype() if hasattr(tensor, "get_dtype") else ""
        if dtype.startswith("F8"):
            raise ModelError(f"weights of {source.name}: {name} is in {dtype} without a scale: take another checkpoint")


def _fill_buffers(model: Any, device: str) -> None:
    """Let the model's initialiser fill buffers that no checkpoint has (rotary frequencies, Gemma's embedding scale)."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # The initialiser skips loaded parameters, because they are flagged.
    model.initialize_weights()


def _keep_layers(model: Any, parts: _Parts, span: Span) -> None:
    layers = list(getattr(model.base_model, parts.layers))
    setattr(model.base_model, parts.layers, nn.ModuleList(layers[span.first : span.last]))


def _name_layers(config: Any, span: Span, shape: ModelShape) -> None:
    config.num_hidden_layers = span.num_layers
    if not getattr(config, "layer_types", None):
        return
    kinds = shape.kinds[span.first : span.last]
    name = type(config).attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(type(config), name, None), property):
        # The family derives it from other fields, which count layers from the model's start.
        config.__class__ = type(type(config).__name__, (type(config),), {name: kinds})
    else:
        config.layer_types = kinds
