"""Runs a client of a testnet, which asks one prompt after another and reports each result."""

import logging
import random
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import torch
import trio

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.named import make_drafter
from dsd_p2p.errors import DsdError, first_cause
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import TextRequest
from dsd_p2p.window.static import StaticPolicy, continuous_tree
from node.lab.testnet.events import Answered, Asking, StartClient
from node.local.events import Failed, Ready
from node.local.pipe import report
from node.member.client import SWARM_RETRY, SwarmClient, open_swarm_client
from node.member.state import SwarmState
from node.watch.outlets import recording

_STALL_S = 15.0
_PAUSE_S = (0.0, 1.0)
_WINDOWS = continuous_tree(depth=8, width=1, window_nodes=4, max_in_flight=4)


def run_client(command: StartClient) -> int:
    """Ask until SIGTERM, then return the exit code."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format=f"%(asctime)s client{command.index} %(levelname)s %(message)s"
    )
    torch.set_num_threads(1)
    try:
        trio.run(_ask_forever, command)
    except (DsdError, BaseExceptionGroup) as exc:
        if not isinstance(cause := first_cause(exc), DsdError):
            raise
        report(command.index, Failed(text=str(cause)[:500]))
        return 1
    return 0


async def _ask_forever(command: StartClient) -> None:
    state = SwarmState(command.swarm)
    source = find_model(state.membership().model, NoProgress())
    drafter = make_drafter(command.draft, source, NoProgress())
    rng = random.Random(command.seed)  # noqa: S311 - which prompt comes next
    is_over = trio.Event()
    async with (
        open_swarm_client(
            state, source, drafter, heartbeat_s=command.heartbeat_s, listen=command.listen, meet_timeout_s=60
        ) as client,
        AsyncExitStack() as stack,
        trio.open_nursery() as nursery,
    ):
        client.engine.tell = stack.enter_context(recording(command.record))
        nursery.start_soon(_note_signal, is_over)
        report(command.index, Ready(address="", span="", weight_bytes=0))
        while not is_over.is_set():
            prompt = rng.randrange(len(command.prompts))
            report(command.index, Asking(prompt=prompt))
            report(command.index, await _ask(client, command, prompt))
            with trio.move_on_after(rng.uniform(*_PAUSE_S)):
                await is_over.wait()
        nursery.cancel_scope.cancel()


async def _note_signal(is_over: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            is_over.set()


@dataclass(slots=True)
class _Written:
    tokens: list[int] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    num_resumes: int = 0


async def _ask(client: SwarmClient, command: StartClient, prompt: int) -> Answered:
    written, error, is_hung = _Written(), None, False
    start_s = trio.current_time()
    with trio.move_on_after(command.deadline_s) as scope:
        try:
            await _write(client, command, prompt, written)
        except DsdError as exc:
            error = exc
    is_hung = scope.cancelled_caught
    return Answered(
        prompt=prompt,
        tokens=written.tokens,
        error=type(error).__name__ if error else "",
        text=str(error)[:300] if error else "",
        is_hung=is_hung,
        seconds=trio.current_time() - start_s,
        pauses_s=[round(pause_s, 3) for pause_s in written.pauses_s],
        resumes=written.num_resumes,
    )


async def _write(client: SwarmClient, command: StartClient, prompt: int, written: _Written) -> None:
    """Write one answer and note each pause caused by a lost route."""
    options = GenerateOptions(
        text=TextRequest(max_tokens=command.max_tokens), stall_timeout_s=_STALL_S, retry=SWARM_RETRY
    )
    async with client.engine.generate(command.prompts[prompt], options, StaticPolicy(_WINDOWS)) as generation:
        num_replays, last_s = 0, trio.current_time()
        async for token in generation:
            written.tokens.append(token)
            now_s = trio.current_time()
            if generation.stats.num_replays > num_replays:
                num_replays = generation.stats.num_replays
                written.pauses_s.append(now_s - last_s)
            written.num_resumes = generation.stats.num_resumes
            last_s = now_s
