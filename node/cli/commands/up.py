"""Implements `dsd up`: run a whole swarm on this machine, with its API and broker, until Ctrl-C."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import msgspec
import torch
import trio

from dsd_p2p.coordination.directory import StageList
from dsd_p2p.coordination.engine import Engine
from dsd_p2p.coordination.open import load_coordinator_model, open_coordinator
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.loader import head_layers
from dsd_p2p.placement.listed import balanced_spans
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.types import PeerId, Span
from dsd_p2p.window.named import adaptive_policy
from node.config import GatewayConfig, UpConfig
from node.console import ConsoleProgress, console
from node.gateway.answering import Served
from node.gateway.backend import EngineBackend
from node.gateway.server import serve_gateway
from node.gateway.setup import default_sampling, make_gateway, read_clients
from node.local.formats import with_format
from node.local.local_swarm import LocalStage, local_swarm, stage_processes
from node.watch.broker import embedded_broker
from node.watch.hub import EventHub
from node.watch.outlets import NO_BROKER, TOPICS, broker_of, check_collector, hearing, publishing, tracing
from node.watch.status import StatusSource, report_forever, seen_peers

DEFAULT_PORT = 8484


def run(config: UpConfig, gateway: GatewayConfig) -> int:
    """Serve until interrupted."""
    trio.run(_up, config, gateway)
    return 0


async def _up(config: UpConfig, api: GatewayConfig) -> None:
    clients = read_clients(api)
    # Check these before anything slow starts: the stages would only fail on them later.
    broker_of(config.mqtt, config.mqtt_ca, TOPICS)
    check_collector(config.otlp)
    torch.set_num_threads(config.threads)
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(ConsoleProgress())
        model = load_coordinator_model(
            config.model, config.draft, progress, draft_dtype=config.draft_dtype, device=config.device, learns=True
        )
        model.source.fetch(model.source.weights.names, progress)
        config = with_format(config, model.source)
        console.print(config.compute_line(config.dtype))
        if not config.mqtt:
            config = msgspec.structs.replace(config, mqtt=await stack.enter_async_context(embedded_broker()))
        num_layers = model.shape.num_layers
        spans = [Span(*bounds) for bounds in balanced_spans(num_layers, config.stages, head_layers(model.source))]
        started = await stack.enter_async_context(local_swarm(stage_processes(config, spans), progress))
        addresses = [stage.address for stage in started]
        engine, stages = await stack.enter_async_context(
            open_coordinator(model, config.dtype, addresses, config.link_model())
        )
        await _introduce(engine, stages)
        served = Served(
            name=config.model,
            key=model.source.key(config.dtype),
            max_positions=stages.stages()[0].max_positions,
            vocab_size=model.shape.vocab_size,
            text=model.text,
            sampling=default_sampling(api, model.text),
            grammars=model.grammars,
        )
        hub = EventHub()
        gateway = make_gateway(
            api,
            clients,
            EngineBackend(engine, partial(adaptive_policy, config.policy)),
            served,
            hub,
            is_ready=partial(_has_route, stages),
            retry=RetryPolicy(),
        )
        async with _telling(config, engine, hub), trio.open_nursery() as nursery:
            port = DEFAULT_PORT if api.port is None else api.port
            url = await nursery.start(serve_gateway, gateway, api.host, port, api.names)
            progress.close()
            _tell(config, url, started)
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    break
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _telling(config: UpConfig, engine: Engine, hub: EventHub) -> AsyncIterator[None]:
    """Send this process's events to the hub and to the broker, if there is one, and receive the stages' events."""
    broker = broker_of(config.mqtt, config.mqtt_ca, TOPICS)
    me = engine.links.me.peer
    async with (
        publishing(broker, me) as publisher,
        hearing(broker, hub, me),
        tracing(config.otlp, me) as trace,
        trio.open_nursery() as nursery,
    ):
        hub.pass_on_to(trace)
        if publisher is not None:
            hub.pass_on_to(publisher.tell)
        engine.tell = hub.tell
        source = StatusSource(
            links=engine.links,
            roles=("coordinator", "gateway"),
            model=config.model,
            num_dropped=lambda: publisher.num_dropped if publisher else 0,
        )

        def look_around() -> None:
            """Report our view of each stage that does not report itself: a stage's own status is better."""
            hub.tick()
            for status in seen_peers(engine.links):
                if status.peer not in hub.speaking or hub.picture.is_silent(status.peer):
                    hub.hear(status)

        nursery.start_soon(report_forever, source, hub.tell, look_around)
        yield
        nursery.cancel_scope.cancel()


def _has_route(stages: StageList) -> bool:
    try:
        return bool(stages.stages())
    except ConfigError:
        return False


async def _introduce(engine: Engine, stages: StageList) -> None:
    """Tell every stage the addresses of all the others, so that a client needs the address of only one."""
    await engine.links.introduce()
    for info in stages.stages():
        # The stage answers only after it has read the introduction, which came first on the same stream.
        await engine.links.round_trip_s(PeerId(info.peer), timeout_s=10)


def _tell(config: UpConfig, url: str, started: list[LocalStage]) -> None:
    console.print(f"{config.stages} stages of {config.model} are up; Ctrl-C ends them.")
    print(f"chat in a browser:   {url}/")
    print(f"an OpenAI client:    export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none")
    print(f"watch:               dsd top {url}")
    if config.mqtt != NO_BROKER:
        print(f"telemetry:           {config.mqtt}  (dsd/v1/{TOPICS}/peers/#)")
    print(
        f"from a terminal:     dsd generate --connect {started[0].address} --model {config.model} --prompt '...'",
        flush=True,
    )
