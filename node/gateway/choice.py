"""Turns the tokens of one answer into text, applies stop strings and passes on log probabilities."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId, TokenLogprobs
from node.gateway.backend import Backend, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next part of an answer.

    tokens, logprobs: of this part, without the tokens that only end the answer.
    """

    text: str
    tokens: tuple[TokenId, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers to a request. Iterate over `pieces` once, then read the other fields."""

    backend: Backend
    text: TextCodec
    prompt: Sequence[TokenId]
    options: GenerateOptions
    stops: tuple[str, ...] = ()
    outcome: Outcome = field(default_factory=Outcome)
    num_tokens: int = 0
    finish_reason: str | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the answer as it arrives. Closing the generator frees the stages.

        Raises:
            DsdError: the reason why the answer ended early.
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
        rest = "" if stops.is_found else stops.feed(streamer.finish()) + stops.rest()
        is_stopped = is_stopped or stops.is_found
        if rest:
            yield Piece(text=rest)
        self.finish_reason = "stop" if is_stopped else "length"


class StopStrings:
    """A filter that passes text on once no stop string can begin in it, and nothing from the first stop string on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """Add `text` and return the part that may be shown now."""
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
        """Return the text that is still held back, after the answer has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
