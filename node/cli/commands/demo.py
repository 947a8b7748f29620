"""Implements `dsd demo`: write the same answer without and with speculation over slow links, and compare the speeds."""

import sys

import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p.errors import LocalProtocolError
from dsd_p2p.window.base import Mode
from node.cli.commands.generate import show
from node.client.choices import make_policy
from node.client.client import open_client
from node.config import DemoConfig
from node.console import ConsoleProgress


def run(config: DemoConfig) -> int:
    """Show both answers and their speeds."""
    trio.run(_demo, config)
    return 0


async def _demo(config: DemoConfig) -> None:
    table = Table(box=None)
    for column in ("mode", "tokens/s", "first token", "tokens per epoch"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    answers: list[list[int]] = []
    speeds: list[float] = []
    with ConsoleProgress() as progress:
        async with open_client(config, progress) as client:
            progress.close()
            for mode in (Mode.PLAIN, Mode.CONTINUOUS):
                print(f"\n── {mode}: {config.stages} stages, {config.link} links ──", flush=True)
                tokens, stats = await client.write(make_policy(config, mode), show)
                print(flush=True)
                answers.append(tokens)
                speed, length = stats.timing.tokens_per_s, stats.details.mean_accepted_length if stats.details else 0.0
                speeds.append(speed)
                table.add_row(mode, f"{speed:.2f}", f"{stats.timing.ttft_s:.2f} s", f"{length:.2f}")
    if answers[0] != answers[1]:
        raise LocalProtocolError("the two answers differ: exact mode is broken; please report this bug")
    print()
    Console(file=sys.stdout).print(table)
    print(f"\nThe same {len(answers[0])} tokens, {speeds[1] / speeds[0]:.1f} times as fast.")
