"""Opens a span of a model: checks its family, loads the layers and chooses the memory order for the device."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.captured.span import CapturedSpan
from dsd_p2p.models.device import device_type
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.heap import give_back
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.lean.span import LeanSpan
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.packed import can_pack, pack_linear_layers
from dsd_p2p.models.source import ModelSource, compute_format
from dsd_p2p.models.span import TORCH_DTYPES, PassOrder, SpanModel
from dsd_p2p.models.stock import StockSpan
from dsd_p2p.types import INT8, STORED, Span

OpenSpan = SpanModel | CapturedSpan | LeanSpan
"""A span that is ready to run: transformers' own layers, on a GPU as graphs, or lean layers."""


def open_span(
    source: ModelSource,
    span: Span,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache_bytes: int = 1 << 30,
    donor: OpenSpan | None = None,
) -> OpenSpan:
    """Load the layers of `span`, ready to run.

    dtype: a name of `ComputeFormat`, "int8" or "stored". device: a torch device.
    donor: a model whose layers are taken over where the spans overlap, not loaded again.

    Raises:
        ConfigError: the span or dtype does not exist, or the device has no such form.
        ModelError: the family is not supported, or the weights cannot be loaded.
    """
    model = _open(source, span, dtype, device, cache_bytes, donor)
    model.grammars = ModelGrammars(source.folder, model.shape.vocab_size)
    give_back()
    return model


def _open(
    source: ModelSource, span: Span, dtype: str, device: str, cache_bytes: int, donor: OpenSpan | None
) -> OpenSpan:
    if dtype in (INT8, STORED):
        if device_type(device) != "cpu":
            raise ConfigError(f"--weights {dtype} runs on the CPU, not on {device}: use --device cpu")
        return open_lean_span(
            source,
            span,
            cache_bytes=cache_bytes,
            donor=donor if isinstance(donor, LeanSpan) else None,
            is_stored=dtype == STORED,
        )
    return _open_float_span(source, span, dtype, device, cache_bytes, donor if isinstance(donor, StockSpan) else None)


def _open_float_span(
    source: ModelSource, span: Span, dtype: str, device: str, cache_bytes: int, donor: StockSpan | None
) -> SpanModel | CapturedSpan:
    torch_dtype = TORCH_DTYPES[compute_format(dtype)]
    order = pass_order(read_model_config(source.folder))
    loaded = load_span(source, span, torch_dtype, device, donor.loaded if donor else None)
    if can_pack(torch_dtype, device):
        pack_linear_layers(loaded.model)
    can_capture = order is PassOrder.TOGETHER and not loaded.shape.is_recurrent
    if can_capture and device_type(device) == "cuda":
        return CapturedSpan(loaded, device=device, cache_bytes=cache_bytes)
    return SpanModel(loaded, order, device=device, cache_bytes=cache_bytes)
