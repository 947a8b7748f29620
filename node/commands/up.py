"""`dsd up`: a whole swarm on this machine and the door to it, until Ctrl-C."""

import signal
from functools import partial
from pathlib import Path

import torch
import trio

from dsd_p2p import units
from dsd_p2p.models.architecture import read_config as read_model_config
from dsd_p2p.models.source import find_model
from dsd_p2p.pipeline.directory import StageList
from dsd_p2p.pipeline.engine import Engine, open_engine
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.types import PeerId, Span
from node.choices import make_adaptive, make_drafter
from node.config import GatewayConfig, UpConfig, read_with_gateway
from node.console import ConsoleProgress, console
from node.gateway.app import Gateway, GatewayLimits, Served
from node.gateway.door import EngineDoor
from node.gateway.keys import Clients, read_keys
from node.gateway.server import check_exposure, serve_gateway
from node.local_swarm import LocalNode, local_swarm, stage_configs
from node.reach import coordinator_transport
from node.text import TextCodec


def run(options: dict[str, object]) -> int:
    """Serve until interrupted."""
    file = options.pop("config", None)
    trio.run(_up, *read_with_gateway(UpConfig, str(file) if file else None, options))
    return 0


async def _up(config: UpConfig, door: GatewayConfig) -> None:
    clients = Clients(read_keys(Path(door.api_keys)) if door.api_keys else [])
    check_exposure(door.host, needs_keys=clients.need_keys)
    torch.set_num_threads(config.threads)
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        model_config = read_model_config(source.folder)
        spans = [Span(*bounds) for bounds in even_spans(int(model_config.num_hidden_layers), config.stages)]
        drafter = make_drafter(config, source, int(model_config.vocab_size), progress)
        async with (
            local_swarm(stage_configs(config, spans), progress) as nodes,
            coordinator_transport(config.link_model()) as transport,
            open_engine(transport, drafter, int(model_config.vocab_size)) as (engine, stages),
            trio.open_nursery() as nursery,
        ):
            await _introduce(engine, stages, nodes)
            (first, *_) = stages.stages()
            gateway = Gateway(
                door=EngineDoor(engine, drafter, partial(make_adaptive, config.window)),
                served=Served(
                    name=config.model,
                    digest=source.digest(),
                    dtype=config.dtype,
                    max_positions=first.max_positions,
                    text=TextCodec(source.folder),
                ),
                clients=clients,
                status=dict,
                metrics=lambda: b"",
                is_ready=lambda: True,
                limits=GatewayLimits(
                    max_running=door.max_running,
                    max_waiting=door.max_waiting,
                    deadline_s=units.seconds(door.answer_timeout),
                ),
            )
            url = await nursery.start(serve_gateway, gateway, door.host, door.port, door.names)
            progress.close()
            _tell(config, url, nodes)
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    break
            nursery.cancel_scope.cancel()


async def _introduce(engine: Engine, stages: StageList, nodes: list[LocalNode]) -> None:
    """Tell every node of all the others, so that the address of one is enough."""
    await stages.add([node.address for node in nodes])
    await engine.links.introduce()
    for info in stages.stages():
        # Answered after the introduction before it on the same stream.
        await engine.links.round_trip_s(PeerId(info.peer), timeout_s=10)


def _tell(config: UpConfig, url: str, nodes: list[LocalNode]) -> None:
    console.print(f"{config.stages} stages of {config.model} are up; Ctrl-C ends them. Open {url} in a browser, or")
    print(f"export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none", flush=True)
    print(f"dsd generate --model {config.model} --connect {nodes[0].address} --prompt '...'", flush=True)
