"""Builds a gateway from its configuration."""

from collections.abc import Callable
from pathlib import Path

from dsd_p2p import units
from dsd_p2p.models.text import TextCodec
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.types import Sampling
from node.config import GatewayConfig
from node.gateway.answering import GatewayLimits, Served
from node.gateway.app import Gateway
from node.gateway.backend import Backend
from node.gateway.keys import Clients, read_keys
from node.gateway.metrics import GatewayMetrics
from node.gateway.server import check_exposure
from node.watch.hub import EventHub


def read_clients(config: GatewayConfig) -> Clients:
    """Return the clients that may ask.

    Raises:
        ConfigError: the keys cannot be read, or the gateway would be open to the network without keys.
    """
    clients = Clients(read_keys(Path(config.api_keys)) if config.api_keys else [])
    check_exposure(config.host, needs_keys=clients.need_keys)
    return clients


def default_sampling(config: GatewayConfig, text: TextCodec) -> Sampling:
    """Return how to sample for a request that does not say."""
    return text.sampling if config.defaults == "model" else Sampling(temperature=1.0)


def make_gateway(
    config: GatewayConfig,
    clients: Clients,
    backend: Backend,
    served: Served,
    hub: EventHub,
    *,
    is_ready: Callable[[], bool],
    retry: RetryPolicy,
) -> Gateway:
    """Return the gateway; `node.gateway.server.serve_gateway` opens it."""
    metrics = GatewayMetrics(hub.picture)
    gateway = Gateway(
        backend=backend,
        served=served,
        clients=clients,
        hub=hub,
        metrics=metrics.text,
        is_ready=is_ready,
        note=metrics.note,
        note_refused=metrics.note_refused,
        retry=retry,
        limits=GatewayLimits(
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            deadline_s=units.seconds(config.answer_timeout),
            is_strict=config.strict,
        ),
    )
    metrics.admission = gateway.answering.admission
    return gateway
