"""Loads the layers of a real model for a stage."""

import torch

from dsd_p2p import units
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.describe import stage_info
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import PeerInfo, Span
from node.config import ComputeFlags, NodeConfig
from node.local.formats import with_format

_WARM_UP_NODES = (1, 8)


def load_span_of(
    source: ModelSource, config: NodeConfig, peer: str, addresses: tuple[str, ...]
) -> tuple[OpenSpan, PeerInfo]:
    """Load the configured layers of a model and warm them up.

    Returns the layers and the peer's description.

    Raises:
        ConfigError, ModelError: the layers do not exist or cannot be loaded.
    """
    config = with_format(config, source)
    num_layers = read_shape(source.folder).num_layers
    span = units.span(config.span) if config.span else Span(0, num_layers)
    model = load_span(source, span, config, config.dtype)
    return model, stage_info(source, config.dtype, model.shape, peer=peer, addresses=addresses, span=span)


def load_span(
    source: ModelSource, span: Span, config: ComputeFlags, dtype: str, donor: OpenSpan | None = None
) -> OpenSpan:
    """Load layers of a model and warm them up. Layers that `donor` holds are taken from it instead of loaded.

    Raises:
        ConfigError, ModelError: the layers do not exist or cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    model = open_span(
        source,
        span,
        dtype=dtype,
        device=config.device,
        cache_bytes=units.num_bytes(config.cache_memory),
        donor=donor,
    )
    _warm_up(model)
    return model


def _warm_up(model: OpenSpan) -> None:
    """Run the slow first passes, which page the weights in and choose kernels, before any request waits for them."""
    for num_nodes in _WARM_UP_NODES:
        cache = model.new_cache(num_nodes)
        forward = SlotTable().chain(num_nodes)
        inputs = [0] * num_nodes if model.is_head else bytes(num_nodes * model.row_bytes)
        if model.is_tail:
            model.views(cache, forward, inputs, range(num_nodes))
        else:
            model.hidden(cache, forward, inputs)
        cache.free()
