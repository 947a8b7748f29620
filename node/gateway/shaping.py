"""Turns the fields of a request that shape or constrain its answer into what the tail understands."""

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from dsd_p2p.types import MAX_CONSTRAINT, MAX_SEEN, Constraint, ConstraintKind, Shaping, TokenId
from dsd_p2p.verification.shaped import UNSHAPED
from node.gateway.errors import ApiError
from node.gateway.schema import ChatRequest, Common, NamedTool, ResponseFormat, StructuredOutputs
from node.gateway.tools.styles import CallStyle, Tool

_ANY_OBJECT = {"type": "object"}


def shaping_of(asked: Common) -> Shaping | None:
    """Return the changes to the logits that a request asks for, or None."""
    shaping = Shaping(
        bias=tuple((int(token), value) for token, value in (asked.logit_bias or {}).items() if value),
        presence=asked.presence_penalty or 0.0,
        frequency=asked.frequency_penalty or 0.0,
        repetition=asked.repetition_penalty or 1.0,
        min_p=asked.min_p or 0.0,
        min_tokens=asked.min_tokens or 0,
    )
    return None if shaping == UNSHAPED else shaping


def with_seen(shaping: Shaping | None, prompt: Sequence[TokenId]) -> Shaping | None:
    """Return the changes for an answer to `prompt`: a repetition penalty counts its tokens too."""
    if shaping is None or shaping.repetition == 1.0:
        return shaping
    # Of a prompt with more different tokens than fit, the latest ones count.
    latest = list(dict.fromkeys(reversed(prompt)))[:MAX_SEEN]
    return msgspec.structs.replace(shaping, seen=tuple(sorted(latest)))


def tools_of(asked: ChatRequest) -> list[Tool]:
    """Return the tools that the answer may call.

    Raises:
        ApiError: the tool that must be called is not among them, or there are none to call.
    """
    given = [
        Tool(
            name=each.function.name,
            description=each.function.description or "",
            parameters=each.function.parameters or {"type": "object", "properties": {}},
        )
        for each in asked.tools or ()
    ]
    choice = asked.tool_choice
    if choice == "required" and not given:
        raise ApiError(400, "tool_choice is required, but tools is empty", param="tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in given if tool.name == choice.function.name]
        if not named:
            raise ApiError(400, f"tool_choice: there is no tool {choice.function.name!r} in tools", param="tool_choice")
        return named
    return [] if choice == "none" else given


def constraint_of(asked: Common, tools: Sequence[Tool], style: CallStyle) -> Constraint | None:
    """Return what the answer must be, or None. style: how the model writes calls.

    Raises:
        ApiError: several constraints exclude each other, or one is too long.
    """
    format_ = asked.response_format if isinstance(asked, ChatRequest) else None
    schema = _schema_of(format_)
    if schema is not None and asked.structured_outputs is not None:
        raise ApiError(400, "give response_format or structured_outputs, not both", param="structured_outputs")
    must_call = isinstance(asked, ChatRequest) and (
        asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
    )
    found: Constraint | None
    if tools and (must_call or schema is not None):
        is_parallel = isinstance(asked, ChatRequest) and asked.parallel_tool_calls is not False
        start = "start: calls" if must_call else f"start: calls | said\nsaid: %json {json.dumps(schema)}"
        source = f"{start}\n{style.rules(tools, is_parallel=is_parallel)}"
        found = Constraint(ConstraintKind.GRAMMAR, source)
    elif schema is not None:
        found = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))
    else:
        found = _structured(asked.structured_outputs)
    if found is not None and not found.source:
        raise ApiError(400, f"structured_outputs: the {found.kind} is empty", param="structured_outputs")
    if found is not None and len(found.source) > MAX_CONSTRAINT:
        raise ApiError(400, f"the schemas have {len(found.source)} characters, at most {MAX_CONSTRAINT} are allowed")
    return found


def _schema_of(format_: ResponseFormat | None) -> dict[str, Any] | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return _ANY_OBJECT
    if format_.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing", param="response_format")
    return format_.json_schema.schema


def _structured(asked: StructuredOutputs | None) -> Constraint | None:
    if asked is None:
        return None
    given = [name for name in asked.__struct_fields__ if getattr(asked, name) is not None]
    if len(given) != 1:
        raise ApiError(
            400, "structured_outputs: give exactly one of json, regex, choice, grammar", param="structured_outputs"
        )
    if asked.json is not None:
        source = asked.json if isinstance(asked.json, str) else json.dumps(asked.json, ensure_ascii=False)
        return Constraint(ConstraintKind.JSON_SCHEMA, source)
    if asked.choice is not None:
        return Constraint(ConstraintKind.REGEX, "|".join(re.escape(each) for each in asked.choice))
    if asked.regex is not None:
        return Constraint(ConstraintKind.REGEX, asked.regex)
    return Constraint(ConstraintKind.GRAMMAR, asked.grammar or "")
