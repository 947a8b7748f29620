"""Turns the tokens of one answer into text, applies stop strings and passes on log probabilities."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import TokenId, TokenLogprobs
from node.gateway.backend import Backend, Outcome
from node.gateway.tools.calls import Call
from node.gateway.tools.reading import NOTHING, AnswerReader, Read
from node.gateway.tools.splitting import overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next part of an answer.

    tokens, logprobs: of this part, without the tokens that only end the answer. reasoning: what the model thought.
    calls: the calls of tools that it completes.
    """

    text: str
    tokens: tuple[TokenId, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers to a request. Iterate over `pieces` once, then read the other fields.

    reader: tells text, reasoning and calls apart. stopped_by: the stop string that ended it, if one did.
    """

    backend: Backend
    text: TextCodec
    prompt: Sequence[TokenId]
    options: GenerateOptions
    stops: tuple[str, ...] = ()
    reader: AnswerReader = field(default_factory=AnswerReader)
    outcome: Outcome = field(default_factory=Outcome)
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    calls: tuple[Call, ...] = ()
    finish_reason: str | None = None
    stopped_by: str = ""

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
                    yield self._piece(self.reader.feed(text), piece.tokens[:shown], piece.logprobs[:shown])
                if is_stopped:
                    break
        rest = "" if stops.is_found else stops.feed(streamer.finish()) + stops.rest()
        is_stopped = is_stopped or stops.is_found
        self.stopped_by = stops.found
        for last in (self.reader.feed(rest), self.reader.finish()):
            if last != NOTHING:
                yield self._piece(last)
        self.finish_reason = "length" if not is_stopped else "tool_calls" if self.calls else "stop"

    def _piece(self, read: Read, tokens: tuple[TokenId, ...] = (), logprobs: tuple[TokenLogprobs, ...] = ()) -> Piece:
        self.calls += read.calls
        if read.reasoning and not read.text:
            self.num_reasoning_tokens += len(tokens)
        return Piece(text=read.text, tokens=tokens, logprobs=logprobs, reasoning=read.reasoning, calls=read.calls)


class StopStrings:
    """A filter that passes text on once no stop string can begin in it, and nothing from the first stop string on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False
        self.found = ""

    def feed(self, text: str) -> str:
        """Add `text` and return the part that may be shown now."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_found = True
            self.found = next(stop for stop in self._stops if self._held.startswith(stop, min(found)))
            shown, self._held = self._held[: min(found)], ""
            return shown
        num_held = max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - num_held], self._held[len(self._held) - num_held :]
        return shown

    def rest(self) -> str:
        """Return the text that is still held back, after the answer has ended."""
        held, self._held = self._held, ""
        return held
