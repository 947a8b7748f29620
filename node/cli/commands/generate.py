"""Implements `dsd generate`: write one answer with a running swarm, or with one started for it."""

import sys

import msgspec
import trio

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import short_peer
from node.client.answer import WrittenAnswer
from node.client.choices import make_policy
from node.client.client import open_client
from node.config import GenerateConfig
from node.console import ConsoleProgress, console


def run(config: GenerateConfig) -> int:
    """Write the answer to standard output."""
    if not config.prompt and not config.prompt_ids:
        raise ConfigError("no prompt: give --prompt TEXT, --prompt - (standard input) or --prompt-ids IDS")
    trio.run(_generate, config)
    return 0


async def _generate(config: GenerateConfig) -> None:
    policy = make_policy(config)
    with ConsoleProgress() as progress:
        async with open_client(config, progress) as client:
            progress.close()
            tokens, stats = await client.write(policy, None if config.json else show)
            text, asked = client.text.decode(tokens), client.asked(client.prompt)
    if config.json:
        answer = WrittenAnswer(text=text, token_ids=tokens, asked=asked, stats=stats.as_json())
        print(msgspec.json.encode(answer).decode(), flush=True)
    else:
        print(flush=True)
        timing = stats.timing
        length = f", {stats.details.mean_accepted_length:.2f} tokens per epoch" if stats.details else ""
        where = f", coordinated by {short_peer(stats.coordinator)}" if stats.coordinator else ""
        console.print(
            f"[dim]{timing.num_tokens} tokens, {timing.tokens_per_s:.2f} tokens/s, first after "
            f"{timing.ttft_s:.2f} s{length}{where}[/]"
        )


def show(piece: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()
