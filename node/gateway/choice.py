"""One answer as text: tokens become characters, stop strings end it, log probabilities go along."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId, TokenLogprobs
from node.gateway.backend import Backend, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new of an answer. tokens, logprobs: of this piece, without what only ends the answer."""

    text: str
    tokens: tuple[TokenId, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers to a request; iterate over `pieces` once, then read the rest."""

    backend: Backend
    text: TextCodec
    prompt: Sequence[TokenId]
    options: GenerateOptions
    stops: tuple[str, ...] = ()
    outcome: Outcome = field(default_factory=Outcome)
    num_tokens: int = 0
    finish_reason: str | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the answer as it comes; closing the generator frees the stages.

        Raises:
            DsdError: what ended it.
        """
        streamer, stops = self.text.streamer(), StopStrings(self.stops)
        is_stopped = False
        async with aclosing(self.backend.write(self.prompt, self.options, self.outcome)) as answer:
            async for piece in answer:
                shown = 0
                text = ""
                for token in piece.tokens:
                    self.num_tokens += 1
                    is_stopped = token in self.options.text.stop_tokens
                    if is_stopped:
                        break
                    shown += 1
                    text += stops.feed(streamer.step(token))
                    if stops.is_found:
                        is_stopped = True
                        break
                if text or shown:
                    yield Piece(text=text, tokens=piece.tokens[:shown], logprobs=piece.logprobs[:shown])
                if is_stopped:
                    break
        if held := stops.rest():
            yield Piece(text=held)
        self.finish_reason = "stop" if is_stopped else "length"


class StopStrings:
    """Passes text on as soon as no stop string can begin in it; nothing from the first stop string on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """Return what may be shown now."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_found = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        num_held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        return shown

    def rest(self) -> str:
        """Return what was held back when the answer has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
