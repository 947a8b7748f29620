"""What a node can serve: layers of a real model."""

import torch

from dsd_p2p.models.architecture import read_config
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import SpanModel
from dsd_p2p.session.slots import SlotTable
from dsd_p2p.types import PeerInfo, Span
from node import units
from node.config import NodeConfig

_WARM_UP_NODES = (1, 8)


def load_span_of(
    source: ModelSource, config: NodeConfig, peer: str, addresses: tuple[str, ...]
) -> tuple[SpanModel, PeerInfo]:
    """Load the configured layers of a model and warm them up.

    Raises:
        ConfigError, ModelError: they do not exist, or cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    num_layers = int(read_config(source.folder).num_hidden_layers)
    span = units.span(config.span) if config.span else Span(0, num_layers)
    model = SpanModel(
        source, span, dtype=config.dtype, device=config.device, cache_bytes=units.num_bytes(config.cache_memory)
    )
    _warm_up(model)
    info = PeerInfo(
        peer=peer,
        addresses=addresses,
        span=span,
        num_layers=num_layers,
        model_name=source.name[-128:],
        model_digest=source.digest(),
        dtype=config.dtype,
        max_positions=model.shape.max_positions,
    )
    return model, info


def _warm_up(model: SpanModel) -> None:
    """The first passes fault the weights in and choose kernels: take that before anybody waits."""
    for num_nodes in _WARM_UP_NODES:
        cache = model.new_cache(num_nodes)
        forward = SlotTable().append(range(num_nodes), [None, *range(num_nodes - 1)], range(num_nodes))
        inputs = [0] * num_nodes if model.is_head else bytes(num_nodes * model.row_bytes)
        if model.is_tail:
            model.views(cache, forward, inputs, range(num_nodes))
        else:
            model.hidden(cache, forward, inputs)
        cache.free()
