"""Reads the calls in an answer, as each family of chat templates has its models write them."""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from node.gateway.tools.splitting import overlap

_ARGUMENTS = ("arguments", "parameters")
"""The names under which the arguments of a call may stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool. arguments: a JSON object as text."""

    id: str
    name: str
    arguments: str

    @property
    def given(self) -> dict[str, Any]:
        """The arguments as an object."""
        found: dict[str, Any] = json.loads(self.arguments)
        return found


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


def calls_of(source: str, names: Collection[str]) -> tuple[Call, ...]:
    """Return the calls in a JSON object or list of objects; none if it is anything else.

    names: the tools that can be called.
    """
    try:
        parsed = _parsed(source)
        found = [_call(each, names) for each in (parsed if isinstance(parsed, list) else [parsed])]
    except (ValueError, RecursionError):
        return ()
    return tuple(found)


def _call(given: Any, names: Collection[str]) -> Call:
    """Return a call. Raises ValueError if it is none, or none that can be sent on."""
    if not isinstance(given, dict) or given.get("name") not in names:
        raise ValueError("no call of a tool")
    arguments: Any = next((given[key] for key in _ARGUMENTS if key in given), {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")  # noqa: TRY004 - callers catch what is no call
    text = json.dumps(arguments, ensure_ascii=False)
    text.encode()  # half of a character cannot be sent
    return Call(id=f"call_{secrets.token_hex(12)}", name=given["name"], arguments=text)


def _parsed(source: str) -> Any:
    return json.loads(source, parse_constant=_no_number)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class TaggedCalls:
    """Calls between tags, each a JSON object; text may stand before and between them."""

    def __init__(self, begin: str, end: str, names: Collection[str]) -> None:
        self._begin, self._end, self._names = begin, end, names
        self._held = ""
        self._is_inside = False
        self._num_calls = 0

    def feed(self, text: str) -> Found:
        """See `CallReader`."""
        self._held += text
        shown = ""
        calls: tuple[Call, ...] = ()
        while True:
            if not self._is_inside:
                at = self._held.find(self._begin)
                if at < 0:
                    return Found(text=shown + self._show(calls), calls=self._counted(calls))
                # Line breaks around calls belong to their form.
                shown += self._said(self._held[:at].rstrip("\n"), calls)
                self._held, self._is_inside = self._held[at:], True
            found, rest = self._complete()
            if not found:
                return Found(text=shown, calls=self._counted(calls))
            calls, self._held, self._is_inside = calls + found, rest, False

    def finish(self) -> Found:
        """See `CallReader`. A call whose closing tag is missing counts if it is complete."""
        rest, self._held = self._held, ""
        calls = calls_of(rest.removeprefix(self._begin), self._names) if self._is_inside else ()
        self._is_inside = False
        return Found(calls=calls) if calls else Found(text=self._said(rest, ()))

    def _complete(self) -> tuple[tuple[Call, ...], str]:
        """Return the call that is held, and what follows it. An argument may hold the closing tag too."""
        at = self._held.find(self._end)
        while at >= 0:
            if calls := calls_of(self._held[len(self._begin) : at], self._names):
                return calls, self._held[at + len(self._end) :]
            at = self._held.find(self._end, at + 1)
        return (), ""

    def _show(self, calls: tuple[Call, ...]) -> str:
        """Return what is certainly text: not what could begin a tag, nor line breaks that a call may follow."""
        text = self._held[: len(self._held) - overlap(self._held, self._begin)].rstrip("\n")
        self._held = self._held[len(text) :]
        return self._said(text, calls)

    def _said(self, text: str, calls: tuple[Call, ...]) -> str:
        return text.lstrip("\n") if self._num_calls or calls else text

    def _counted(self, calls: tuple[Call, ...]) -> tuple[Call, ...]:
        self._num_calls += len(calls)
        return calls


class WholeCalls:
    """An answer that is either text or calls: JSON from its first character on, perhaps after a mark."""

    def __init__(self, marks: tuple[str, ...], names: Collection[str]) -> None:
        self._marks, self._names = marks, names
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
        calls = calls_of(self._unmarked(), self._names)
        shown, self._held = self._held, ""
        return Found(calls=calls) if calls else Found(text=shown)

    def _unmarked(self) -> str:
        text = self._held.strip()
        for mark in self._marks:
            text = text.removeprefix(mark).lstrip()
        return text
