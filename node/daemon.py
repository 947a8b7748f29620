"""One node: loads its span, listens, serves until told to stop."""

import logging
import random
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trio

from dsd_p2p.errors import PeerError
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import SpanModel
from dsd_p2p.pipeline.links import PeerLinks
from dsd_p2p.pipeline.stage_server import StageLimits, StageServer
from dsd_p2p.session.slots import SlotTable
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import open_libp2p
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.version import PROTOCOL_ID
from node import units
from node.config import NodeConfig
from node.events import Loading, NodeEvent, Ready

logger = logging.getLogger(__name__)

_PEER_TIMEOUT_S = 60.0
_WARM_UP_NODES = (1, 8)


async def run_node(config: NodeConfig, source: ModelSource, report: Callable[[NodeEvent], None]) -> None:
    """Serve until SIGINT or SIGTERM, or until cancelled.

    Raises:
        ConfigError, ModelError: it cannot start as configured.
    """
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="dsd-node-") as scratch:
        identity = Path(config.identity or f"{scratch}/identity")
        async with open_libp2p(
            identity=identity, listen=config.listen, protocol=PROTOCOL_ID, max_frame_bytes=MAX_FRAME_BYTES
        ) as inner:
            report(Loading(what=f"load {config.model} {config.span or 'all layers'}"))
            model, me = await trio.to_thread.run_sync(_load, config, source, inner.peer, inner.addresses)
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of an emulated link
            async with emulate(inner, config.link_model(), rng) as transport, trio.open_nursery() as nursery:
                links = PeerLinks(transport, me)
                server = StageServer(links, model, StageLimits(), time.perf_counter)
                nursery.start_soon(server.run)
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                for address in config.peers:
                    nursery.start_soon(_meet, links, address)
                report(Ready(address=inner.addresses[0], span=str(me.span), weight_bytes=model.weight_bytes))


def _load(config: NodeConfig, source: ModelSource, peer: str, addresses: tuple[str, ...]) -> tuple[SpanModel, PeerInfo]:
    from dsd_p2p.models.architecture import read_config

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


async def _meet(links: PeerLinks, address: str) -> None:
    try:
        info = await links.connect(address, _PEER_TIMEOUT_S)
        logger.info("peer met peer=%s span=%s", info.peer, info.span)
    except PeerError as exc:
        logger.warning("peer not reachable address=%s error=%s", address, exc)


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return
