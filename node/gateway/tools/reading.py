"""Reads an answer: what it thought, what it says, and what it calls."""

from dataclasses import dataclass

from node.gateway.tools.calls import Call, CallReader, Found
from node.gateway.tools.splitting import TagSplitter

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The next part of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


NOTHING = Read()


class AnswerReader:
    """Splits one answer.

    calls: reads calls, if the request has tools. thinks: whether the model writes its reasoning between tags.
    is_thinking: whether the prompt ended with the opening tag.
    """

    def __init__(self, calls: CallReader | None = None, *, thinks: bool = False, is_thinking: bool = False) -> None:
        self._calls = calls
        self._thoughts = TagSplitter(THINK, THOUGHT, is_inside=is_thinking) if thinks or is_thinking else None
        self._has_text = False

    def feed(self, text: str) -> Read:
        """Add `text` and return what can be told by now."""
        parts = [(False, text)] if self._thoughts is None else self._thoughts.feed(text)
        said = "".join(part for is_inside, part in parts if not is_inside)
        return self._read(parts, Found(text=said) if self._calls is None else self._calls.feed(said))

    def finish(self) -> Read:
        """Return what is still held back, after the answer has ended."""
        parts = [] if self._thoughts is None else self._thoughts.finish()
        said = "".join(part for is_inside, part in parts if not is_inside)
        if self._calls is None:
            return self._read(parts, Found(text=said))
        before, rest = self._calls.feed(said), self._calls.finish()
        return self._read(parts, Found(text=before.text + rest.text, calls=before.calls + rest.calls))

    def _read(self, parts: list[tuple[bool, str]], found: Found) -> Read:
        text = found.text
        if self._thoughts is not None and not self._has_text:
            # Blank lines between reasoning and answer belong to neither.
            text = text.lstrip("\n")
        self._has_text = self._has_text or bool(text)
        reasoning = "".join(part for is_inside, part in parts if is_inside)
        return Read(text=text, reasoning=reasoning, calls=found.calls)
