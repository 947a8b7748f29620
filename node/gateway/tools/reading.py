"""Reads an answer: what it thought, what it says, and what it calls."""

from dataclasses import dataclass

from node.gateway.tools.calls import Call, CallReader, Found
from node.gateway.tools.splitting import overlap

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The next part of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


NOTHING = Read()


class Thoughts:
    """Splits the reasoning off the beginning of an answer. Later in the answer its tags are text.

    is_thinking: whether the prompt ended with the opening tag.
    """

    def __init__(self, *, is_thinking: bool) -> None:
        self._held = ""
        self._is_begun, self._is_over = is_thinking, False
        self._has_text = False

    def feed(self, text: str) -> tuple[str, str]:
        """Add `text`; return what was thought and what is said, as far as it can be told."""
        self._held += text
        if not self._is_begun and not self._is_over:
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._is_begun, self._held = True, begun.removeprefix(THINK)
            elif THINK.startswith(begun):
                return "", ""
            else:
                self._is_over = True
        if self._is_over:
            return "", self._said()
        thought, tag, rest = self._held.partition(THOUGHT)
        if tag:
            self._is_over, self._held = True, rest
            return thought, self._said()
        kept = len(self._held) - overlap(self._held, THOUGHT)
        thought, self._held = self._held[:kept], self._held[kept:]
        return thought, ""

    def finish(self) -> tuple[str, str]:
        """Return what is still held back, after the answer has ended."""
        rest, self._held = self._held, ""
        return (rest, "") if self._is_begun and not self._is_over else ("", rest)

    def _said(self) -> str:
        # Blank lines between reasoning and answer belong to neither.
        text = self._held if self._has_text or not self._is_begun else self._held.lstrip("\n")
        self._held, self._has_text = "", self._has_text or bool(text)
        return text


class AnswerReader:
    """Splits one answer.

    calls: reads calls, if the request has tools. thoughts: splits reasoning off, if the model writes some.
    max_calls: how many calls the answer may make; 0: any number.
    """

    def __init__(
        self, calls: CallReader | None = None, thoughts: Thoughts | None = None, *, max_calls: int = 0
    ) -> None:
        self._calls, self._thoughts, self._max_calls = calls, thoughts, max_calls
        self._num_calls = 0

    def feed(self, text: str) -> Read:
        """Add `text` and return what can be told by now."""
        thought, said = ("", text) if self._thoughts is None else self._thoughts.feed(text)
        return self._read(thought, Found(text=said) if self._calls is None else self._calls.feed(said))

    def finish(self) -> Read:
        """Return what is still held back, after the answer has ended."""
        thought, said = ("", "") if self._thoughts is None else self._thoughts.finish()
        if self._calls is None:
            return self._read(thought, Found(text=said))
        before, rest = self._calls.feed(said), self._calls.finish()
        return self._read(thought, Found(text=before.text + rest.text, calls=before.calls + rest.calls))

    def _read(self, thought: str, found: Found) -> Read:
        calls = found.calls[: max(0, self._max_calls - self._num_calls)] if self._max_calls else found.calls
        self._num_calls += len(calls)
        return Read(text=found.text, reasoning=thought, calls=calls)
