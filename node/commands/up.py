"""`dsd up`: a whole swarm on this machine, until Ctrl-C."""

import signal

import trio

from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.models.architecture import read_config as read_model_config
from dsd_p2p.models.source import find_model
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.pipeline.engine import open_engine
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.types import PeerId, Span
from node.config import UpConfig, read_config
from node.console import ConsoleProgress, console
from node.local_swarm import local_swarm, stage_configs
from node.reach import coordinator_transport


def run(options: dict[str, object]) -> int:
    """Serve until interrupted."""
    file = options.pop("config", None)
    trio.run(_up, read_config(UpConfig, str(file) if file else None, options))
    return 0


async def _up(config: UpConfig) -> None:
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        num_layers = int(read_model_config(source.folder).num_hidden_layers)
        spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
        async with local_swarm(stage_configs(config, spans), progress) as nodes:
            addresses = [node.address for node in nodes]
            await _introduce(addresses)
            progress.close()
            console.print(f"{config.stages} stages of {config.model} are up; Ctrl-C ends them. Use them with")
            print(f"dsd generate --model {config.model} --connect {addresses[0]} --prompt '...'", flush=True)
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    return


async def _introduce(addresses: list[str]) -> None:
    """Tell every node of all the others, so that the address of one is enough."""
    async with (
        coordinator_transport(LinkModel()) as transport,
        open_engine(transport, NgramDrafter(), vocab_size=1) as (engine, stages),
    ):
        await stages.add(addresses)
        await engine.links.introduce()
        for info in stages.stages():
            # Answered after the introduction before it on the same stream.
            await engine.links.round_trip_s(PeerId(info.peer), timeout_s=10)
