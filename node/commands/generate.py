"""`dsd generate`: one answer, from a swarm that runs or from one started for it."""

import random
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import msgspec
import torch
import trio

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_config as read_model_config
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.pipeline.engine import Engine, GenerateOptions, Generation, open_engine
from dsd_p2p.placement.chain import even_spans
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import open_libp2p
from dsd_p2p.types import Span, TokenId
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.version import PROTOCOL_ID
from node import units
from node.choices import make_drafter, make_policy
from node.config import GenerateConfig, read_config
from node.console import ConsoleProgress, console
from node.local_swarm import local_swarm
from node.text import TextCodec, parse_ids


def run(options: dict[str, object]) -> int:
    """Write the answer to standard output."""
    file = options.pop("config", None)
    config = read_config(GenerateConfig, str(file) if file else None, options)
    if not config.prompt and not config.prompt_ids:
        raise ConfigError("nothing to write about: give --prompt TEXT, --prompt - or --prompt-ids")
    trio.run(_generate, config)
    return 0


async def _generate(config: GenerateConfig) -> None:
    torch.set_num_threads(config.threads)
    policy = make_policy(config)
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        model_config = read_model_config(source.folder)
        text = TextCodec(source.folder)
        prompt = _prompt(config, text)
        options = GenerateOptions(
            max_tokens=config.max_tokens,
            sampling=config.sampling(),
            stop_tokens=text.stop_tokens,
            prefill_chunk=config.prefill_chunk,
            stall_timeout_s=units.seconds(config.stall_timeout),
        )
        async with AsyncExitStack() as stack:
            addresses = list(config.connect)
            if not addresses:
                spans = [Span(*bounds) for bounds in even_spans(int(model_config.num_hidden_layers), config.stages)]
                addresses = await stack.enter_async_context(local_swarm(config, spans, progress))
            drafter = make_drafter(config, source, int(model_config.vocab_size), progress)
            engine = await stack.enter_async_context(coordinator(config, source, drafter, int(model_config.vocab_size)))
            await engine.add_stages(addresses)
            _check_digest(engine, source)
            progress.close()
            async with engine.generate(prompt, options, policy) as generation:
                tokens = await _stream(generation, text, is_quiet=config.json)
            summary = summarise(config, generation, drafter, len(prompt), tokens)
    if config.json:
        print(msgspec.json.encode({"text": text.decode(tokens), "token_ids": tokens, "stats": summary}).decode())
    else:
        print()
        console.print(
            f"[dim]{len(tokens)} tokens, {summary['tokens_per_s']:.2f} tokens/s, first after {summary['ttft_s']:.2f} s, "
            f"{summary['mean_accepted_length']:.2f} tokens an epoch, {summary['num_windows']} windows[/]"
        )


@asynccontextmanager
async def coordinator(
    config: GenerateConfig, source: ModelSource, drafter: Drafter, vocab_size: int
) -> AsyncIterator[Engine]:
    """Run an engine over libp2p with an identity of its own."""
    with tempfile.TemporaryDirectory(prefix="dsd-coordinator-") as scratch:
        async with open_libp2p(
            identity=Path(scratch) / "identity",
            listen="/ip4/127.0.0.1/tcp/0",
            protocol=PROTOCOL_ID,
            max_frame_bytes=MAX_FRAME_BYTES,
        ) as inner:
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of an emulated link
            async with (
                emulate(inner, config.link_model(), rng) as transport,
                open_engine(transport, drafter, vocab_size) as engine,
            ):
                yield engine


def _prompt(config: GenerateConfig, text: TextCodec) -> list[TokenId]:
    if config.prompt_ids:
        return parse_ids(config.prompt_ids)
    return text.encode(sys.stdin.read() if config.prompt == "-" else config.prompt, is_raw=config.raw)


def _check_digest(engine: Engine, source: ModelSource) -> None:
    held = engine.chain()[0]
    if held.model_digest != source.digest():
        raise ConfigError(
            f"the swarm runs {held.model_name} ({held.model_digest[:12]}), this is {source.name} ({source.digest()[:12]}): "
            "give --model as the swarm has it"
        )


async def _stream(generation: Generation, text: TextCodec, *, is_quiet: bool) -> list[TokenId]:
    tokens: list[TokenId] = []
    streamer = text.streamer()
    async for token in generation:
        tokens.append(token)
        if not is_quiet:
            sys.stdout.write(streamer.step(token))
            sys.stdout.flush()
    return tokens


def summarise(
    config: GenerateConfig, generation: Generation, drafter: Drafter, num_prompt_tokens: int, tokens: list[TokenId]
) -> dict[str, object]:
    """Return what a script wants to know of a finished request; times in seconds.

    tokens_per_s counts from the first token on, so that prefill is in `ttft_s` alone.
    """
    stats = generation.stats
    first_at_s, first_size = generation.arrivals[0]
    last_at_s, _ = generation.arrivals[-1]
    decode_s = last_at_s - first_at_s
    num_after_first = len(tokens) - first_size
    counts = asdict(stats)
    counts.pop("first_token_at_s")
    return {
        "mode": config.mode,
        "verification": "exact",
        "num_relaxed_tokens": 0,
        "window": config.window,
        "decision": asdict(generation.decision),
        "drafter": drafter.name if config.mode != "plain" else None,
        "finish_reason": generation.finish.reason if generation.finish else None,
        "num_prompt_tokens": num_prompt_tokens,
        "num_tokens": len(tokens),
        "tokens_per_s": num_after_first / decode_s if decode_s > 0 else float(len(tokens)),
        "ttft_s": first_at_s - generation.started_at_s,
        "total_s": last_at_s - generation.started_at_s,
        "mean_accepted_length": len(tokens) / max(1, stats.num_epochs),
        "link_bytes_per_token": stats.link_bytes / max(1, len(tokens)),
        "mean_stage_s": [round(total / max(1, stats.num_windows), 6) for total in stats.stage_s],
        "mean_draft_step_s": fmean([stats.draft_s / stats.num_draft_steps]) if stats.num_draft_steps else 0.0,
        **counts,
    }
