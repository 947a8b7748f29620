"""The ways in which models are told of tools and write calls, chosen by the model's chat template."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from node.gateway.tools.calls import CallReader, TaggedCalls, WholeCalls


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that an answer can call. parameters: the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStyle:
    """How one family of chat templates writes calls.

    begin, end: around each call; empty where an answer is either text or one JSON value of calls. marks: what may stand
    before that value. key: the name of the arguments. is_list: whether the calls are one JSON list.
    is_native: whether the template takes tools; otherwise the messages tell the model of them.
    """

    name: str
    begin: str = ""
    end: str = ""
    marks: tuple[str, ...] = ()
    key: str = "arguments"
    is_list: bool = False
    is_native: bool = True

    def reader(self, tools: Sequence[Tool]) -> CallReader:
        """Return a reader for one answer that may call `tools`."""
        names = frozenset(tool.name for tool in tools)
        return TaggedCalls(self.begin, self.end, names) if self.begin else WholeCalls(self.marks, names)

    def rules(self, tools: Sequence[Tool], *, is_parallel: bool) -> str:
        """Return the rule `calls` in Lark's notation: one call of any tool, or several if `is_parallel`."""
        one = " | ".join(f"call{index}" for index in range(len(tools)))
        if self.begin:
            more = r'("\n" tagged)*' if is_parallel else ""
            tagged = f"{_text(self.begin)} {_text(chr(10))} one {_text(chr(10))} {_text(self.end)}"
            calls = f"calls: tagged {more}\ntagged: {tagged}\n"
        elif self.is_list:
            more = r'(", " one)*' if is_parallel else ""
            calls = f'calls: "[" one {more} "]"\n'
        else:
            calls = "calls: one\n"
        return f"{calls}one: {one}\n" + "".join(self._rule(index, tool) for index, tool in enumerate(tools))

    def _rule(self, index: int, tool: Tool) -> str:
        """Return the rule of one call. The schema keeps a root of its own, to which its references lead."""
        before = f'{{"name": {json.dumps(tool.name)}, "{self.key}": '
        schema = {**(tool.parameters or {"type": "object"}), "x-guidance": _SPACED}
        return f'call{index}: {_text(before)} given{index} "}}"\ngiven{index}: %json {json.dumps(schema)}\n'

    def with_tools(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Return messages that tell of the tools and of earlier calls in words, for a template that knows none."""
        if self.is_list:
            return [_with_short_ids(message) for message in messages]
        if self.is_native:
            return list(messages)
        told = [self._told(message) for message in messages]
        if not tools:
            return told
        lines = "\n".join(json.dumps(tool.described["function"], ensure_ascii=False) for tool in tools)
        call = f'{self.begin}\n{{"name": NAME, "arguments": OBJECT}}\n{self.end}'
        words = f"You can call these functions:\n<tools>\n{lines}\n</tools>\nTo call one, answer with:\n{call}"
        if told and told[0]["role"] == "system":
            return [{**told[0], "content": f"{told[0]['content']}\n\n{words}"}, *told[1:]]
        return [{"role": "system", "content": words}, *told]

    def _told(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = message.get("tool_calls")
        if not calls:
            return message
        written = [f"{self.begin}\n{json.dumps(_named(call), ensure_ascii=False)}\n{self.end}" for call in calls]
        return {"role": message["role"], "content": "\n".join(filter(None, (message.get("content"), *written)))}


def _named(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    return {"name": call["function"]["name"], "arguments": arguments}


_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How calls are spaced: as `json.dumps` does, which is what models are trained on, and no other way."""


def _text(words: str) -> str:
    """Return words as a literal of Lark's notation."""
    return json.dumps(words, ensure_ascii=False)


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose ids of calls have nine letters and digits: Mistral's templates refuse others."""
    changed = dict(message)
    if message.get("tool_call_id"):
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short_id(call.get("id", ""))} for call in message["tool_calls"]]
    return changed


def _short_id(given: str) -> str:
    return hashlib.sha256(given.encode()).hexdigest()[:9]


HERMES = CallStyle(name="hermes", begin="<tool_call>", end="</tool_call>")
LLAMA3 = CallStyle(name="llama3", marks=("<|python_tag|>",), key="parameters")
MISTRAL = CallStyle(name="mistral", marks=("[TOOL_CALLS]",), is_list=True)
IN_WORDS = CallStyle(name="in words", begin="<tool_call>", end="</tool_call>", is_native=False)
"""For templates that know no tools: the same form as Hermes, explained in the system message."""


def style_of(template: str) -> CallStyle:
    """Return the style of a chat template, in Jinja."""
    # Some templates have calls in the form of XML, which is not read here.
    if not re.search(r"\btools\b", template) or "<function=" in template:
        return IN_WORDS
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "python_tag" in template or '"parameters"' in template:
        return LLAMA3
    return IN_WORDS
