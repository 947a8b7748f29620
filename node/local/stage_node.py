"""Runs one stage: load its span, listen, serve until told to stop."""

import logging
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from dsd_p2p.errors import DsdError, PeerError, first_cause
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.server import StageServer
from dsd_p2p.stage.span_model import SpanModel as StageModel
from dsd_p2p.telemetry.mqtt import Broker
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import open_libp2p
from dsd_p2p.types import PeerInfo
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.version import PROTOCOL_ID
from node.config import NodeConfig
from node.console import ConsoleProgress
from node.crash import explain
from node.local.events import Failed, Loading, Ready, StageEvent
from node.watch.outlets import TOPICS, broker_of, publishing
from node.watch.status import StatusSource, report_forever

logger = logging.getLogger(__name__)

LoadStage = Callable[[NodeConfig, str, tuple[str, ...]], "tuple[LoadedSpan, PeerInfo]"]
"""Returns the stage's model and the peer's description, given the configuration, the peer id and the addresses."""

_PEER_TIMEOUT_S = 60.0


class LoadedSpan(StageModel, Protocol):
    """A stage server's model that knows the size of its weights."""

    @property
    def weight_bytes(self) -> int:
        """Size of the tensors in bytes."""
        ...


def serve(config: NodeConfig, report: Callable[[StageEvent], None], load: LoadStage | None = None) -> int:
    """Serve the stage that `load` returns, by default the configured model, until stopped. Returns the exit code.

    Reports `Failed` if the stage cannot start.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    try:
        trio.run(run_node, config, load or _model_loader(config), report)
    except Exception as exc:  # process boundary: the parent has to know why
        cause = first_cause(exc)
        report(
            Failed(text=str(cause) if isinstance(cause, DsdError) else explain(exc, f"stage {config.span or 'all'}"))
        )
        return 1
    return 0


def _model_loader(config: NodeConfig) -> LoadStage:
    # Only a real model needs torch, so it is imported here.
    from dsd_p2p.models.source import find_model
    from node.local.stage_models import load_span_of

    with ConsoleProgress() as progress:
        return partial(load_span_of, find_model(config.model, progress))


async def run_node(config: NodeConfig, load: LoadStage, report: Callable[[StageEvent], None]) -> None:
    """Serve the stage that `load` returns until SIGINT, SIGTERM or cancellation.

    Raises:
        ConfigError, ModelError: the stage cannot start as configured.
    """
    broker = broker_of(config.mqtt, config.mqtt_ca, TOPICS)
    with tempfile.TemporaryDirectory(prefix="dsd-node-") as scratch:
        identity = Path(config.identity or f"{scratch}/identity")
        async with open_libp2p(
            identity=identity, listen=config.listen, protocol=PROTOCOL_ID, max_frame_bytes=MAX_FRAME_BYTES
        ) as inner:
            report(Loading(what=f"load {config.model} {config.span or 'all layers'}"))
            model, me = await trio.to_thread.run_sync(load, config, inner.peer, inner.addresses)
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of an emulated link
            async with emulate(inner, config.link_model(), rng) as transport, trio.open_nursery() as nursery:
                links = PeerLinks(transport, me)
                server = StageServer(links, model, StageLimits(), time.perf_counter)
                nursery.start_soon(run_services, links, [server])
                if broker is not None:
                    nursery.start_soon(_tell_broker, broker, links, server, model)
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                for address in config.peers:
                    nursery.start_soon(_meet, links, address)
                report(Ready(address=inner.addresses[0], span=str(me.span), weight_bytes=model.weight_bytes))


async def _tell_broker(broker: Broker, links: PeerLinks, server: StageServer, model: LoadedSpan) -> None:
    """Publish this peer's status to the broker, forever."""
    async with publishing(broker, links.me.peer) as publisher:
        assert publisher is not None, "there is a broker"
        source = StatusSource(
            links=links,
            roles=("stage",),
            server=server,
            # A fake stage has no budget.
            budget=lambda: getattr(model, "budget", None),
            num_dropped=lambda: publisher.num_dropped,
        )
        await report_forever(source, publisher.tell)


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
