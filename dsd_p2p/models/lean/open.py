"""Opens a lean span: reads a few layers at a time, checks them, packs them, and lets go of the floats."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_model_config, shape_of
from dsd_p2p.models.checkpoints.base import Groups
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.lean.build import AS_STORED, IN_FLOAT, IN_INT8, Built, build_layer, norm_of
from dsd_p2p.models.lean.check import check_structure, settle_exactness
from dsd_p2p.models.lean.embedding import Rows, RowsOnDisk
from dsd_p2p.models.lean.products import (
    FloatProduct,
    Int8TwiceProduct,
    MakeProduct,
    RefinedHead,
    Weight,
    check_finite,
)
from dsd_p2p.models.lean.rotary import Rotary
from dsd_p2p.models.lean.span import Ends, LeanSpan
from dsd_p2p.models.loader import LoadedSpan, load_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import PassOrder, SpanModel
from dsd_p2p.types import Span

_LAYERS_AT_ONCE = 4


def open_lean_span(
    source: ModelSource,
    span: Span,
    *,
    cache_bytes: int = 1 << 30,
    donor: LeanSpan | None = None,
    is_exact: bool = True,
    is_stored: bool = False,
) -> LeanSpan:
    """Load the layers of `span` in int8 or as they are stored, ready to run.

    is_stored: keep matrices in the 4-bit numbers that the checkpoint has, and its embedding on disk, where that can be.
    donor: a model whose layers and ends are taken over where the spans overlap. is_exact: make sure that windows change no
        bit, even if that costs speed; drafters need not.

    Raises:
        ConfigError: the span does not exist.
        ModelError: the family has no int8 form, or the weights cannot be loaded.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ModelError("this CPU has no fast int8 products: use --weights float")
    config = read_model_config(source.folder)
    order, shape = pass_order(config), shape_of(config)
    if not 0 <= span.first < span.last <= shape.num_layers:
        raise ConfigError(f"span {span} is outside the model's layers [0, {shape.num_layers})")
    if shape.is_recurrent:
        raise ModelError(f"{config.model_type} has no int8 form: its recurrent layers need floats; use --weights float")
    layers: dict[int, Built] = {}
    ends = Ends()
    rotary = None
    if donor is not None:
        layers = {donor.span.first + index: layer for index, layer in enumerate(donor.layers)}
        ends, rotary = donor.ends, donor.rotary
    for piece in _missing(span, layers, ends, shape.num_layers):
        # The next floats are read only when these are gone.
        stock = _load(source, piece, order)
        for index in range(piece.first, piece.last):
            try:
                layer = stock.narrow(Span(index, index + 1))
                rotary = _checked(layer, rotary)
                layers[index], its_ends = _as_stored(layer, source) if is_stored else _rounded(layer)
            except ModelError as exc:
                raise ModelError(f"{config.model_type} has no int8 form: {exc}; use --weights float") from exc
            ends = ends.with_those_of(its_ends)
        del stock, layer
    assert rotary is not None
    held = [layers[index] for index in range(span.first, span.last)]
    if len({each.heads for each in held}) > 1:
        raise ModelError(f"{config.model_type} has no int8 form: layers with different heads; use --weights float")
    model = LeanSpan(
        shape=shape,
        span=span,
        layers=held,
        ends=ends.of(is_head=span.first == 0, is_tail=span.last == shape.num_layers),
        rotary=rotary,
        cache_bytes=cache_bytes,
    )
    if is_exact:
        settle_exactness(model)
    return model


def _load(source: ModelSource, piece: Span, order: PassOrder) -> SpanModel:
    """Return a few layers in float32, whose weights are all finite."""
    stock = SpanModel(load_span(source, piece, torch.float32, "cpu"), order)
    for parameter in stock.model.parameters():
        check_finite(parameter)
    return stock


def _missing(span: Span, given: Mapping[int, Built], ends: Ends, num_layers: int) -> Iterator[Span]:
    """Yield pieces of the span that have to be loaded: layers that are not given, and layers whose ends are not."""
    index = span.first
    wanted = [
        layer
        for layer in range(span.first, span.last)
        if layer not in given
        or (layer == 0 and ends.embedding is None)
        or (layer == num_layers - 1 and ends.head is None)
    ]
    while wanted:
        index = wanted[0]
        piece = [layer for layer in wanted[:_LAYERS_AT_ONCE] if layer - index == wanted.index(layer)]
        yield Span(index, piece[-1] + 1)
        wanted = wanted[len(piece) :]


def _checked(stock: SpanModel, rotary: Rotary | None) -> Rotary:
    """Compare one layer's lean form in float32 with transformers' own, and return the rotary embedding."""
    loaded = stock.loaded
    in_float = build_layer(_layer(loaded), _kind(stock), IN_FLOAT, is_scripted=False)
    if rotary is None:
        if getattr(loaded.model.base_model, "rotary_emb", None) is None:
            raise ModelError("no rotary embedding")
        rotary = Rotary(loaded.model.base_model.rotary_emb, loaded.model.config, in_float.heads.head_dim)
    lean = LeanSpan(
        shape=stock.shape,
        span=stock.span,
        layers=[in_float],
        ends=_ends(loaded, lambda weight: FloatProduct(weight.floats), torch.float32),
        rotary=rotary,
    )
    check_structure(lean, stock)
    return rotary


def _rounded(stock: SpanModel) -> tuple[Built, Ends]:
    """Return the int8 form of one layer."""
    ends = _ends(stock.loaded, lambda weight: RefinedHead(weight.floats), torch.bfloat16)
    return build_layer(_layer(stock.loaded), _kind(stock), IN_INT8), ends


def _as_stored(stock: SpanModel, source: ModelSource) -> tuple[Built, Ends]:
    """Return one layer in the checkpoint's own 4-bit numbers where it has some, and in int8 where it has not."""
    loaded, weights = stock.loaded, source.weights

    def groups_of(name: str) -> Groups | None:
        stored_as = loaded.stored_as.get(f"{loaded.layer_name(stock.span.first)}{name}")
        return weights.groups(stored_as) if stored_as else None

    embedding = None
    rows = weights.rows(loaded.stored_as.get(loaded.embedding_name, ""))
    if rows is not None:
        scale = float(getattr(loaded.model.get_input_embeddings(), "embed_scale", 1.0))
        embedding = RowsOnDisk(rows, scale)
    ends = _ends(loaded, lambda weight: Int8TwiceProduct(weight.floats), torch.bfloat16, embedding)
    return build_layer(_layer(loaded), _kind(stock), AS_STORED, groups_of), ends


def _layer(loaded: LoadedSpan) -> nn.Module:
    layer: nn.Module = getattr(loaded.model.base_model, loaded.parts.layers)[0]
    return layer


def _kind(stock: SpanModel) -> str:
    return stock.shape.kinds[stock.span.first]


@torch.inference_mode()
def _ends(loaded: LoadedSpan, make_head: MakeProduct, dtype: torch.dtype, embedding: RowsOnDisk | None = None) -> Ends:
    """Return what the span has of the model's ends. dtype: of an embedding in memory. embedding: the one to use instead."""
    model, base = loaded.model, loaded.model.base_model
    is_head, is_tail = loaded.span.first == 0, loaded.span.last == loaded.shape.num_layers
    held: Rows | RowsOnDisk | None = embedding if is_head else None
    if is_head and held is None:
        # Some families scale their embeddings.
        held = Rows(base.get_input_embeddings()(torch.arange(loaded.shape.vocab_size)).to(dtype))
    head = model.get_output_embeddings() if is_tail else None
    if head is not None and head.bias is not None:
        raise ModelError("a head with a bias")
    return Ends(
        embedding=held,
        norm=norm_of(getattr(base, loaded.parts.norm)) if is_tail else None,
        head=None if head is None else make_head(Weight(floats=head.weight.float())),
    )
