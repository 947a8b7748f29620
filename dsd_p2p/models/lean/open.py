"""Opens a span in int8: reads a few layers at a time, checks them, rounds them, and lets go of the floats."""

from collections.abc import Iterator, Mapping

import torch

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_model_config, shape_of
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.lean.build import Built, Products, build_layer, norm_of
from dsd_p2p.models.lean.check import check_structure, settle_exactness
from dsd_p2p.models.lean.products import (
    FloatProduct,
    Int8Product,
    Int8TwiceProduct,
    MakeProduct,
    RefinedHead,
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
) -> LeanSpan:
    """Load the layers of `span` in int8, ready to run.

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
    layers: dict[int, Built] = {}
    ends = Ends()
    rotary = None
    if donor is not None:
        layers = {donor.span.first + index: layer for index, layer in enumerate(donor.layers)}
        ends, rotary = donor.ends, donor.rotary
    for piece in _missing(span, layers, ends, shape.num_layers):
        stock = _load(source, piece, order)
        for index in range(piece.first, piece.last):
            try:
                built, its_ends, rotary = _rounded(stock.narrow(Span(index, index + 1)), rotary)
            except ModelError as exc:
                raise ModelError(f"{config.model_type} has no int8 form: {exc}; use --weights float") from exc
            layers[index] = built
            ends = Ends(
                embedding=ends.embedding if its_ends.embedding is None else its_ends.embedding,
                norm=its_ends.norm or ends.norm,
                head=its_ends.head or ends.head,
            )
        # The next floats are read only when these are gone.
        del stock
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


def _rounded(stock: SpanModel, rotary: Rotary | None) -> tuple[Built, Ends, Rotary]:
    """Return the int8 form of one layer, after comparing its float form with transformers' own."""
    loaded = stock.loaded
    base, kind = loaded.model.base_model, stock.shape.kinds[stock.span.first]
    layer = getattr(base, loaded.parts.layers)[0]
    in_float = build_layer(layer, kind, Products.all(FloatProduct), is_scripted=False)
    if rotary is None:
        if getattr(base, "rotary_emb", None) is None:
            raise ModelError("no rotary embedding")
        rotary = Rotary(base.rotary_emb, loaded.model.config, in_float.heads.head_dim)
    check_structure(
        LeanSpan(
            shape=stock.shape,
            span=stock.span,
            layers=[in_float],
            ends=_ends(loaded, FloatProduct, torch.float32),
            rotary=rotary,
        ),
        stock,
    )
    built = build_layer(
        layer, kind, Products(qkv=Int8TwiceProduct, o=Int8TwiceProduct, gate_up=Int8Product, down=Int8TwiceProduct)
    )
    return built, _ends(loaded, RefinedHead, torch.bfloat16), rotary


@torch.inference_mode()
def _ends(loaded: LoadedSpan, make_head: MakeProduct, dtype: torch.dtype) -> Ends:
    model, base = loaded.model, loaded.model.base_model
    is_head, is_tail = loaded.span.first == 0, loaded.span.last == loaded.shape.num_layers
    embedding = None
    if is_head:
        # Some families scale their embeddings.
        embedding = base.get_input_embeddings()(torch.arange(loaded.shape.vocab_size)).to(dtype)
    head = model.get_output_embeddings() if is_tail else None
    if head is not None and head.bias is not None:
        raise ModelError("a head with a bias")
    return Ends(
        embedding=embedding,
        norm=norm_of(getattr(base, loaded.parts.norm)) if is_tail else None,
        head=None if head is None else make_head(head.weight.float()),
    )
