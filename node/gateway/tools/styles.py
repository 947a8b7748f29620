"""The ways in which models are told of tools and write calls, chosen by the model's chat template."""

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

    def reader(self) -> CallReader:
        """Return a reader for one answer."""
        keys = ("arguments", "parameters")
        return TaggedCalls(self.begin, self.end, keys) if self.begin else WholeCalls(self.marks, keys)

    def rules(self, tools: Sequence[Tool], *, is_parallel: bool) -> str:
        """Return the rule `calls` in Lark's notation: one call of any tool, or several if `is_parallel`."""
        one = {"anyOf": [self._schema(tool) for tool in tools]}
        if self.begin:
            more = r'("\n" call)*' if is_parallel else ""
            begin, end = json.dumps(f"{self.begin}\n"), json.dumps(f"\n{self.end}")
            return f"calls: call {more}\ncall: {begin} body {end}\nbody: %json {_json(one)}\n"
        if self.is_list:
            some = {"type": "array", "items": one, "minItems": 1, "maxItems": 16 if is_parallel else 1}
            return f"calls: %json {_json(some)}\n"
        return f"calls: %json {_json(one)}\n"

    def _schema(self, tool: Tool) -> dict[str, Any]:
        properties = {"name": {"const": tool.name}, self.key: dict(tool.parameters) or {"type": "object"}}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def with_tools(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Return messages that tell of the tools and of earlier calls in words, for a template that knows none."""
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
    with suppress(ValueError):
        arguments = json.loads(arguments)
    return {"name": call["function"]["name"], "arguments": arguments}


_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How calls are spaced: as `json.dumps` does, which is what models are trained on, and no other way."""


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _SPACED}, ensure_ascii=False)


HERMES = CallStyle(name="hermes", begin="<tool_call>", end="</tool_call>")
LLAMA3 = CallStyle(name="llama3", marks=("<|python_tag|>",), key="parameters")
MISTRAL = CallStyle(name="mistral", marks=("[TOOL_CALLS]",), is_list=True)
IN_WORDS = CallStyle(name="in words", begin="<tool_call>", end="</tool_call>", is_native=False)
"""For templates that know no tools: the same form as Hermes, explained in the system message."""


def style_of(template: str) -> CallStyle:
    """Return the style of a chat template, in Jinja."""
    if not re.search(r"\btools\b", template):
        return IN_WORDS
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "python_tag" in template or '"parameters"' in template:
        return LLAMA3
    return IN_WORDS
