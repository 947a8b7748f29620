"""Opens a span of a model: checks its family, loads the layers and chooses the memory order for the device."""

from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.packed import can_pack, pack_linear_layers
from dsd_p2p.models.source import ModelSource, compute_format
from dsd_p2p.models.span import TORCH_DTYPES, SpanModel
from dsd_p2p.types import Span


def open_span(
    source: ModelSource,
    span: Span,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache_bytes: int = 1 << 30,
    donor: SpanModel | None = None,
    is_packed: bool = True,
) -> SpanModel:
    """Load the layers of `span`, ready to run.

    dtype: a name of `ComputeFormat`. device: a torch device.
    donor: a model whose layers are taken over where the spans overlap, not loaded again.
    is_packed: use the memory order that is fastest for a few rows (`dsd_p2p.models.packed`), if the device has one.

    Raises:
        ConfigError: the span or dtype does not exist.
        ModelError: the family is not supported, or the weights cannot be loaded.
    """
    torch_dtype = TORCH_DTYPES[compute_format(dtype)]
    order = pass_order(read_model_config(source.folder))
    loaded = load_span(source, span, torch_dtype, device, donor.loaded if donor else None)
    if is_packed and can_pack(torch_dtype, device):
        pack_linear_layers(loaded.model)
    return SpanModel(loaded, order, device=device, cache_bytes=cache_bytes)
