"""Opens a coordinator for the commands: model, tokenizer, drafter and a connected engine."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

import msgspec
import torch
import trio

from dsd_p2p import units
from dsd_p2p.coordination.engine import Engine, GenerateOptions
from dsd_p2p.coordination.open import load_coordinator_model, open_coordinator
from dsd_p2p.coordination.statistics import AnswerStatistics, statistics_of
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.text import TextCodec
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.session.retry import RetryPolicy
from dsd_p2p.session.timing import Timing
from dsd_p2p.types import PeerId, Relaxation, Span, TextRequest, TokenId
from dsd_p2p.window.base import Mode, WindowPolicy
from node.client.answer import Asked
from node.client.choices import make_relaxation
from node.config import GenerateConfig, NodeConfig
from node.local.formats import with_format
from node.local.local_swarm import LocalStage, local_swarm, stage_processes
from node.local.netlab import address, namespace, netlab
from node.local.stage_processes import StageProcess
from node.member.client import SWARM_RETRY, SwarmClient, better_coordinator, open_swarm_client
from node.member.model import find_member_model
from node.member.state import SwarmState


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A coordinator that is ready to write answers. Made by `open_client`. started: the stages started here."""

    config: GenerateConfig
    engine: Engine
    text: TextCodec
    prompt: list[TokenId]
    started: list[LocalStage]
    swarm: SwarmClient | None = None

    def asked(self, prompt: list[TokenId]) -> Asked:
        """Return what makes the answer to `prompt` the text that it is, for `dsd verify`."""
        key = next(info.model for info in self.engine.links.known.values() if info.model is not None)
        return Asked(model=self.config.model, key=key, prompt_ids=prompt, text=self._text(None, None))

    def _text(self, max_tokens: int | None, relaxation: Relaxation | None) -> TextRequest:
        config = self.config
        return TextRequest(
            max_tokens=max_tokens or config.max_tokens,
            sampling=config.sampling(),
            stop_tokens=self.text.stop_tokens,
            relaxation=relaxation or make_relaxation(config),
        )

    async def write(
        self,
        policy: WindowPolicy,
        show: Callable[[str], None] | None = None,
        prompt: list[TokenId] | None = None,
        max_tokens: int | None = None,
        relaxation: Relaxation | None = None,
        experience: str = "",
    ) -> tuple[list[TokenId], AnswerStatistics]:
        """Write the answer to `prompt`, or to the client's own prompt, and pass its text to `show` as it arrives.

        max_tokens, relaxation: override the configuration. experience: see `GenerateOptions`.

        Returns the new tokens and the run's statistics.

        Raises:
            DsdError: the request failed.
        """
        config, prompt = self.config, prompt or self.prompt
        options = GenerateOptions(
            text=self._text(max_tokens, relaxation),
            prefill_chunk=config.prefill_chunk,
            stall_timeout_s=units.seconds(config.stall_timeout),
            hidden_format=config.hidden,
            retry=SWARM_RETRY if self.swarm else RetryPolicy(),
            audit=config.audit,
            experience=experience,
        )
        tokens: list[TokenId] = []
        streamer = self.text.streamer()
        if (
            self.swarm is not None
            and config.coordinator == "auto"
            and not options.audit
            and options.text.relaxation is None
        ):
            coordinator = better_coordinator(self.swarm.directory, self.swarm.transport.peer, self.engine.own_drafter)
            if coordinator is not None:
                return await self._ask(coordinator, prompt, options, show)
        async with self.engine.generate(prompt, options, policy) as generation:
            async for token in generation:
                tokens.append(token)
                if show is not None:
                    show(streamer.step(token))
        if show is not None:
            show(streamer.finish())
        return tokens, statistics_of(generation)

    async def _ask(
        self, coordinator: PeerId, prompt: list[TokenId], options: GenerateOptions, show: Callable[[str], None] | None
    ) -> tuple[list[TokenId], AnswerStatistics]:
        """Let another peer coordinate the request."""
        assert self.swarm is not None
        tokens: list[TokenId] = []
        streamer, timing = self.text.streamer(), Timing(started_at_s=trio.current_time())
        deadline_s = units.seconds(self.config.timeout)
        async with aclosing(self.swarm.thin.generate(prompt, options, deadline_s)) as answer:
            async for piece in answer:
                timing.arrived(len(piece.tokens), trio.current_time())
                for token in piece.tokens:
                    tokens.append(token)
                    if show is not None:
                        show(streamer.step(token))
        if show is not None:
            show(streamer.finish())
        return tokens, AnswerStatistics(timing=timing, coordinator=coordinator)


@asynccontextmanager
async def open_client(config: GenerateConfig, progress: Progress) -> AsyncIterator[Client]:
    """Load what a coordinator needs and connect it to stages.

    The stages are those of `config.swarm` or `config.connect`. Without either, start stages on this machine.

    Raises:
        ConfigError, ModelError, PeerError: a setting is invalid, or a model or a peer is not available.
    """
    torch.set_num_threads(config.threads)
    if config.audit and not config.swarm:
        raise ConfigError("--audit needs the signing peers of a swarm: add --swarm NAME")
    state = SwarmState(config.swarm) if config.swarm else None
    if state is not None:
        stored = state.membership()
        find_member_model(stored, progress)
        choice = state.choice()
        draft = choice.draft if choice is not None and config.draft == "auto" else config.draft
        config = msgspec.structs.replace(config, model=stored.model, dtype=stored.dtype, draft=draft)
    draft = "ngram" if config.mode == Mode.PLAIN else config.draft
    model = load_coordinator_model(config.model, draft, progress, draft_dtype=config.draft_dtype, device=config.device)
    prompt = _prompt(config, model.text)
    async with AsyncExitStack() as stack:
        started: list[LocalStage] = []
        client = None
        if state is not None:
            link = config.link_model()
            client = await stack.enter_async_context(open_swarm_client(state, model.source, model.drafter, link=link))
            engine = client.engine
        else:
            if not config.connect:
                model.source.fetch(model.source.weights.names, progress)
                config = with_format(config, model.source)
            started, addresses, link, host = await _stages(config, model.shape.num_layers, progress, stack)
            engine, _ = await stack.enter_async_context(open_coordinator(model, config.dtype, addresses, link, host))
        yield Client(
            config=config,
            engine=engine,
            text=model.text,
            prompt=prompt,
            started=started,
            swarm=client,
        )


async def _stages(
    config: GenerateConfig, num_layers: int, progress: Progress, stack: AsyncExitStack
) -> tuple[list[LocalStage], list[str], LinkModel, str]:
    """Return the stages started here, and the addresses, link and host to use.

    Starts no stages if `config.connect` names some.
    """
    link, host = config.link_model(), "127.0.0.1"
    if config.connect:
        if config.netlab:
            raise ConfigError("--netlab starts its own stages: leave out --connect or --netlab")
        return [], list(config.connect), link, host
    spans = [Span(*bounds) for bounds in even_spans(num_layers, config.stages)]
    processes = stage_processes(config, spans)
    if config.netlab:
        stack.enter_context(netlab(len(spans) + 1, link))
        processes = [_in_namespace(each.config, host) for host, each in enumerate(processes, start=1)]
        link, host = LinkModel(), address(0)
    started = await stack.enter_async_context(local_swarm(processes, progress))
    return started, [stage.address for stage in started], link, host


def _in_namespace(config: NodeConfig, host: int) -> StageProcess:
    listen = f"/ip4/{address(host)}/tcp/0"
    config = msgspec.structs.replace(config, listen=listen, link="0ms", rate="0mbit", jitter="0ms")
    return StageProcess(config=config, namespace=namespace(host))


def _prompt(config: GenerateConfig, text: TextCodec) -> list[TokenId]:
    if config.prompt_ids:
        return _parse_ids(config.prompt_ids)
    return text.encode(sys.stdin.read() if config.prompt == "-" else config.prompt, is_raw=config.raw)


def _parse_ids(text: str) -> list[TokenId]:
    """Return text like `1,2,3` as tokens.

    Raises:
        ConfigError: a part is not a whole number.
    """
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as exc:
        raise ConfigError(f"--prompt-ids {text!r}: write token ids separated by commas") from exc
