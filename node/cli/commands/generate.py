"""`dsd generate`: one answer, from a swarm that runs or from one started for it."""

import sys

import msgspec
import trio

from dsd_p2p.errors import ConfigError
from node.client.choices import make_policy
from node.client.client import open_client
from node.config import GenerateConfig, read_config
from node.console import ConsoleProgress, console


def run(options: dict[str, object]) -> int:
    """Write the answer to standard output."""
    file = options.pop("config", None)
    config = read_config(GenerateConfig, str(file) if file else None, options)
    if not config.prompt and not config.prompt_ids:
        raise ConfigError("nothing to write about: give --prompt TEXT, --prompt - or --prompt-ids")
    trio.run(_generate, config)
    return 0


async def _generate(config: GenerateConfig) -> None:
    policy = make_policy(config)
    with ConsoleProgress() as progress:
        async with open_client(config, progress) as client:
            progress.close()
            tokens, stats = await client.write(policy, None if config.json else show)
            text = client.text.decode(tokens)
    if config.json:
        print(msgspec.json.encode({"text": text, "token_ids": tokens, "stats": stats}).decode(), flush=True)
    else:
        print(flush=True)
        length = f", {stats['mean_accepted_length']:.2f} tokens an epoch" if "mean_accepted_length" in stats else ""
        where = f", coordinated by …{str(stats['coordinator'])[-8:]}" if "coordinator" in stats else ""
        console.print(
            f"[dim]{stats['num_tokens']} tokens, {stats['tokens_per_s']:.2f} tokens/s, first after "
            f"{stats['ttft_s']:.2f} s{length}{where}[/]"
        )


def show(piece: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()
