"""Reads the calls in an answer, as each family of chat templates has its models write them."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from node.gateway.tools.splitting import TagSplitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool. arguments: a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a piece of an answer turned out to be: text for the user, and calls that are complete."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class CallReader(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> Found:
        """Add `text` and return what can be told by now."""
        ...

    def finish(self) -> Found:
        """Return what is still held back, after the answer has ended. What is no call is text."""
        ...


def calls_of(source: str, keys: tuple[str, ...]) -> tuple[Call, ...]:
    """Return the calls in a JSON object or list of objects; none if it is anything else.

    keys: the names under which the arguments may stand.
    """
    try:
        parsed = json.loads(source)
    except ValueError:
        return ()
    found: list[Call] = []
    for each in parsed if isinstance(parsed, list) else [parsed]:
        name, arguments = _parts(each, keys)
        if name is None:
            return ()
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append(Call(id=f"call_{secrets.token_hex(12)}", name=name, arguments=text))
    return tuple(found)


def _parts(call: Any, keys: tuple[str, ...]) -> tuple[str | None, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, None
    return call["name"], next((call[key] for key in keys if key in call), {})


class TaggedCalls:
    """Calls between tags, each a JSON object; text may stand before and between them."""

    def __init__(self, begin: str, end: str, keys: tuple[str, ...]) -> None:
        self._begin, self._end, self._keys = begin, end, keys
        self._splitter = TagSplitter(begin, end)
        self._inside = self._breaks = ""
        self._num_calls = 0

    def feed(self, text: str) -> Found:
        """See `CallReader`."""
        return self._read(self._splitter.feed(text))

    def finish(self) -> Found:
        """See `CallReader`. A call whose closing tag is missing counts if it is complete."""
        found = self._read(self._splitter.finish())
        rest, self._inside = self._inside, ""
        calls = calls_of(rest, self._keys)
        if calls:
            return Found(text=found.text, calls=found.calls + calls)
        breaks = "" if self._num_calls and not rest else self._breaks
        return Found(text=found.text + breaks + (self._begin + rest if rest else ""), calls=found.calls)

    def _read(self, parts: Sequence[tuple[bool, str]]) -> Found:
        shown = ""
        calls: tuple[Call, ...] = ()
        for number, (is_inside, text) in enumerate(parts):
            if not is_inside:
                # Line breaks around calls belong to their form. Whether a call follows is not known yet.
                said = self._breaks + (text.lstrip("\n") if self._num_calls + len(calls) and not self._breaks else text)
                self._breaks = said[len(said.rstrip("\n")) :]
                shown += said.rstrip("\n")
                continue
            self._inside += text
            if number < len(parts) - 1 or not self._splitter.is_inside:
                found = calls_of(self._inside, self._keys)
                shown += "" if found else self._breaks + self._begin + self._inside + self._end
                calls, self._inside, self._breaks = calls + found, "", ""
        self._num_calls += len(calls)
        return Found(text=shown, calls=calls)


class WholeCalls:
    """An answer that is either text or calls: JSON from its first character on, perhaps after a mark."""

    def __init__(self, marks: tuple[str, ...], keys: tuple[str, ...]) -> None:
        self._marks, self._keys = marks, keys
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> Found:
        """See `CallReader`."""
        if self._is_text:
            return Found(text=text)
        self._held += text
        begun = self._unmarked()
        could_be_mark = any(mark.startswith(begun) for mark in self._marks)
        if begun and begun[0] not in "[{" and not could_be_mark:
            self._is_text = True
            shown, self._held = self._held, ""
            return Found(text=shown)
        return Found()

    def finish(self) -> Found:
        """See `CallReader`."""
        calls = calls_of(self._unmarked(), self._keys)
        shown, self._held = self._held, ""
        return Found(calls=calls) if calls else Found(text=shown)

    def _unmarked(self) -> str:
        text = self._held.strip()
        for mark in self._marks:
            text = text.removeprefix(mark).lstrip()
        return text
