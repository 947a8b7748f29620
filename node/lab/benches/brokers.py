"""Implements `dsd bench brokers`: decoding with a telemetry broker that is alive, was killed, or never answers."""

import random
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import msgspec
import torch

from dsd_p2p.coordination.engine import Engine
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.telemetry.mqtt import MqttPublisher
from dsd_p2p.window.static import StaticPolicy, sync_chain
from node.lab.benches.serving import Run, random_prompts, serving_swarm, write_together
from node.lab.config import UsersConfig
from node.lab.receipt import print_table, sample
from node.watch.broker import embedded_broker
from node.watch.outlets import NO_BROKER, TOPICS, broker_of, publishing

_WINDOW = sync_chain(4)
"""A fixed window: it does not change from answer to answer."""


async def run_brokers(config: UsersConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Write the same answers in swarms whose stages and coordinator publish to different brokers, in turns.

    Raises:
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    shape = read_shape(source.folder)
    num_layers, vocab_size = shape.num_layers, shape.vocab_size
    prompts = random_prompts(vocab_size, config.sessions)
    runs: dict[str, list[Run]] = {}
    engines: dict[str, Engine] = {}
    publishers: dict[str, MqttPublisher] = {}
    async with AsyncExitStack() as stack, AsyncExitStack() as doomed:
        silent = stack.enter_context(_silent_broker())
        urls = {
            "none": NO_BROKER,
            "alive": await stack.enter_async_context(embedded_broker()),
            "killed": await doomed.enter_async_context(embedded_broker()),
            "silent": silent,
        }
        for arm, url in urls.items():
            told = msgspec.structs.replace(config, mqtt=url)
            engine = await stack.enter_async_context(serving_swarm(told, source, num_layers, vocab_size, progress))
            publisher = await stack.enter_async_context(publishing(broker_of(url, "", TOPICS), engine.links.me.peer))
            if publisher is not None:
                engine.tell, publishers[arm] = publisher.tell, publisher
            engines[arm], runs[arm] = engine, []
        for number in range(-1, rounds):
            if number == 0:
                # Kill it after the warm-up: the connected publishers must notice.
                await doomed.aclose()
            order = list(engines)
            random.Random(number).shuffle(order)  # noqa: S311 - reproducible
            for arm in order:
                engine = engines[arm]
                run = await write_together(engine, config, prompts, lambda: StaticPolicy(_WINDOW))
                progress.step(f"{arm}, round {number + 1}", number + 1, rounds)
                if number >= 0:
                    runs[arm].append(run)
        dropped = {arm: publishers[arm].num_dropped if arm in publishers else 0 for arm in runs}
    results = {arm: _summary(each, runs["none"], dropped[arm]) for arm, each in runs.items()}
    _show(results)
    return {"config": {name: getattr(config, name) for name in config.__struct_fields__}, "arms": results}


@contextmanager
def _silent_broker() -> Iterator[str]:
    """Yield the URL of a broker that accepts connections and never sends anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"


def _summary(runs: list[Run], none: list[Run], num_dropped: int) -> dict[str, object]:
    pairs = list(zip(runs, none, strict=True))
    return {
        "tokens_per_s": sample([run.tokens_per_s for run in runs]),
        "over_none": sample([run.tokens_per_s / base.tokens_per_s for run, base in pairs]),
        "identical": all(run.tokens == base.tokens for run, base in pairs),
        "num_dropped": num_dropped,
    }


def _show(results: dict[str, dict[str, object]]) -> None:
    rows = []
    for arm, result in results.items():
        speed, ratio = msgspec.to_builtins(result["tokens_per_s"]), msgspec.to_builtins(result["over_none"])
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} .. {ratio['high']:.3f})"
        rows.append((arm, f"{speed['median']:.2f}", spread, str(result["identical"]), str(result["num_dropped"])))
    print_table(("broker", "tokens/s", "over none", "same text", "events dropped"), rows)
