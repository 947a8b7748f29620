"""Calls and reasoning in answers: every template family's form, cut anywhere; what must be called is a constraint."""

import json
import random

import msgspec
import pytest

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Constraint, ConstraintKind
from node.gateway.apis.responses.kept import KeptConversations
from node.gateway.apis.responses.request import messages_of
from node.gateway.errors import ApiError
from node.gateway.schema import ChatMessage, ChatRequest, CompletionRequest
from node.gateway.shaping import constraint_of, shaping_of, tools_of, with_seen
from node.gateway.tools.reading import AnswerReader, Thoughts
from node.gateway.tools.styles import HERMES, IN_WORDS, LLAMA3, MISTRAL, Tool, style_of

WEATHER = Tool(
    name="get_weather",
    description="The weather of a city",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
ADD = Tool(
    name="add",
    description="",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
)

F = Tool(name="f", description="", parameters={})
OFFERED = [WEATHER, ADD, F]

# Answers as models of each family write them.
RECORDED = [
    (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        HERMES,
        'Let me look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n<tool_call>\n'
        '{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>',
        "Let me look.",
        [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})],
    ),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', "", [("add", {"a": 1, "b": 2})]),
    (HERMES, "No call: 3 < 4, <tool> is a word.", "No call: 3 < 4, <tool> is a word.", []),
    (HERMES, "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
    (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [("get_weather", {"city": "Rome"})]),
    (LLAMA3, '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', "", [("add", {"a": 1, "b": 2})]),
    (LLAMA3, '{"city": "Rome"}', '{"city": "Rome"}', []),
    (LLAMA3, "It is sunny.", "It is sunny.", []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "arguments": {"a": 3, "b": 4}}]',
        "",
        [("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})],
    ),
    (MISTRAL, '[{"name": "add", "arguments": {"a": 1, "b": 2}}]', "", [("add", {"a": 1, "b": 2})]),
    (MISTRAL, "[1] is a footnote.", "[1] is a footnote.", []),
]


def read(reader, pieces):
    parts = [reader.feed(piece) for piece in pieces] + [reader.finish()]
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(part.text for part in parts), "".join(part.reasoning for part in parts), calls


def cut(rng, text):
    at = 0
    while at < len(text):
        size = rng.randrange(1, 9)
        yield text[at : at + size]
        at += size


@pytest.mark.parametrize(
    ("style", "answer", "text", "calls"), RECORDED, ids=lambda each: str(getattr(each, "name", ""))[:10]
)
def test_recorded_answers_are_read_however_they_arrive(style, answer, text, calls):
    for seed in range(30):
        pieces = [answer] if not seed else list(cut(random.Random(seed), answer))
        assert read(AnswerReader(style.reader(OFFERED)), pieces) == (text, "", calls), pieces


def test_text_before_a_call_is_shown_while_it_arrives():
    reader = AnswerReader(HERMES.reader(OFFERED))
    assert reader.feed("It is ").text == "It is "
    assert reader.feed("sunny <tool").text == "sunny "
    assert reader.feed("box>").text == "<toolbox>"
    assert [call.name for call in reader.feed('<tool_call>{"name": "f", "arguments": {}}</tool_call>').calls] == ["f"]


def test_each_call_has_an_id_of_its_own():
    first, second = (
        AnswerReader(HERMES.reader(OFFERED)).feed('<tool_call>{"name": "f"}</tool_call>').calls for _ in range(2)
    )
    assert first[0].id != second[0].id
    assert first[0].arguments == "{}"


@pytest.mark.parametrize(
    ("answer", "is_thinking", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, ("Yes.", "\nhm\n")),
        ("hm</think>Yes.", True, ("Yes.", "hm")),
        ("<think>cut off", False, ("", "cut off")),
        ("Use the <think> tag, then </think>.", False, ("Use the <think> tag, then </think>.", "")),
        ("<think>a</think>b <think>c</think>", False, ("b <think>c</think>", "a")),
        ("<thinking is hard", False, ("<thinking is hard", "")),
        ("No thoughts.", False, ("No thoughts.", "")),
    ],
)
def test_reasoning_is_split_from_the_answer(answer, is_thinking, expected):
    for seed in range(20):
        pieces = [answer] if not seed else list(cut(random.Random(seed), answer))
        text, reasoning, _ = read(AnswerReader(thoughts=Thoughts(is_thinking=is_thinking)), pieces)
        assert (text, reasoning) == expected
    assert read(AnswerReader(), ["<think>hm</think>"])[0] == "<think>hm</think>", "a model that does not think"


def test_a_call_in_the_reasoning_is_no_call():
    answer = '<think>I could <tool_call>{"name": "f"}</tool_call></think>No.'
    assert read(AnswerReader(HERMES.reader(OFFERED), Thoughts(is_thinking=False)), [answer])[0] == "No."
    assert read(AnswerReader(HERMES.reader(OFFERED), Thoughts(is_thinking=False)), [answer])[2] == []


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", IN_WORDS),
        ("{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}", HERMES),
        ('{% if tools %}{{ "[AVAILABLE_TOOLS]" }}{% endif %}[TOOL_CALLS]', MISTRAL),
        ('{% if tools %}Respond in {"name": ..., "parameters": ...} <|python_tag|>{% endif %}', LLAMA3),
        ("{% if tools %}some other way{% endif %}", IN_WORDS),
        ("{% if tools %}<tool_call>\\n<function=name>{% endif %}", IN_WORDS),
        ("", IN_WORDS),
    ],
)
def test_the_style_follows_the_template(template, style):
    assert style_of(template) is style


def test_a_template_without_tools_is_told_in_words():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"role": "tool", "content": "sunny"},
    ]
    told = IN_WORDS.with_tools(messages, [WEATHER])
    assert told[0]["content"].startswith("Be brief.\n\nYou can call these functions:")
    assert '"name": "get_weather"' in told[0]["content"]
    assert told[2]["content"] == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert told[3] == {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}
    assert IN_WORDS.with_tools(messages[1:2], [WEATHER])[0]["role"] == "system"
    assert IN_WORDS.with_tools(messages[1:2], []) == messages[1:2]
    assert HERMES.with_tools(messages, [WEATHER]) == messages


def asked(**fields):
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return msgspec.convert(base | fields, ChatRequest)


TOOLS = [tool.described for tool in (WEATHER, ADD)]


def test_the_choice_of_a_tool_decides_which_are_offered():
    assert [tool.name for tool in tools_of(asked(tools=TOOLS))] == ["get_weather", "add"]
    assert tools_of(asked(tools=TOOLS, tool_choice="none")) == []
    named = {"type": "function", "function": {"name": "add"}}
    assert [tool.name for tool in tools_of(asked(tools=TOOLS, tool_choice=named))] == ["add"]
    for wrong in ({"tool_choice": "required"}, {"tool_choice": named}, {"tools": TOOLS[:1], "tool_choice": named}):
        with pytest.raises(ApiError):
            tools_of(asked(**wrong))


@pytest.fixture(scope="module")
def allows(smollm):
    grammars, codec = ModelGrammars(smollm.folder, 49152), TextCodec(smollm.folder)

    def check(constraint, text):
        matcher = grammars.grammar(constraint, codec.stop_tokens).start()
        for token in [*codec.encode(text, is_raw=True), codec.stop_tokens[0]]:
            if not matcher.allows(token):
                return False
            matcher.advance(token)
        return True

    return check


@pytest.mark.parametrize("style", [HERMES, IN_WORDS, LLAMA3, MISTRAL], ids=lambda style: style.name)
def test_a_tool_that_must_be_called_is_called_in_the_models_own_form(allows, style):
    request = asked(tools=TOOLS, tool_choice="required")
    constraint = constraint_of(request, [WEATHER, ADD], style)
    one = {"name": "add", style.key: {"a": 1, "b": 2}}
    written = json.dumps([one] if style.is_list else one)
    if style.begin:
        written = f"{style.begin}\n{written}\n{style.end}"
    assert allows(constraint, written)
    assert read(AnswerReader(style.reader(OFFERED)), [written]) == ("", "", [("add", {"a": 1, "b": 2})])
    assert not allows(constraint, "Hello.")
    assert not allows(constraint, written.replace('"b"', '"c"'))
    assert not allows(constraint, written.replace("add", "sub"))
    if style.begin:
        assert allows(constraint, f"{written}\n{written}")
        single = constraint_of(asked(tools=TOOLS, tool_choice="required", parallel_tool_calls=False), [ADD], style)
        assert allows(single, written)
        assert not allows(single, f"{written}\n{written}")


def test_with_a_schema_and_tools_the_answer_is_one_or_the_other(allows):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    constraint = constraint_of(asked(tools=TOOLS, response_format=format_), [ADD], HERMES)
    assert allows(constraint, '{"x": 1}')
    assert allows(constraint, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>')
    assert not allows(constraint, "Hello.")


@pytest.mark.parametrize(
    ("fields", "kind", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, ConstraintKind.JSON_SCHEMA, '{"a": [1]}', "[1]"),
        ({"structured_outputs": {"choice": ["yes", "no (really)"]}}, ConstraintKind.REGEX, "no (really)", "no"),
        ({"structured_outputs": {"regex": "[0-9]+"}}, ConstraintKind.REGEX, "123", "x"),
        ({"structured_outputs": {"json": {"type": "integer"}}}, ConstraintKind.JSON_SCHEMA, "12", '"a"'),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, ConstraintKind.JSON_SCHEMA, "12", '"a"'),
        ({"structured_outputs": {"grammar": 'start: "a" "b"'}}, ConstraintKind.GRAMMAR, "ab", "a"),
    ],
)
def test_each_way_to_ask_for_a_form_is_a_constraint(allows, fields, kind, good, bad):
    constraint = constraint_of(asked(**fields), [], HERMES)
    assert constraint.kind is kind
    assert allows(constraint, good)
    assert not allows(constraint, bad)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": ""}},
        {"structured_outputs": {"choice": [""]}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 70_000}}}},
    ],
)
def test_forms_that_contradict_each_other_or_are_too_long_are_refused(fields):
    with pytest.raises(ApiError):
        constraint_of(asked(**fields), [], HERMES)


def test_what_shapes_nothing_is_no_shaping():
    assert shaping_of(asked(frequency_penalty=0, logit_bias={"5": 0}, repetition_penalty=1, min_p=0)) is None
    shaping = shaping_of(asked(presence_penalty=0.5, logit_bias={"5": -100, "7": 2}, min_tokens=3))
    assert (shaping.presence, shaping.bias, shaping.min_tokens) == (0.5, ((5, -100.0), (7, 2.0)), 3)
    assert with_seen(shaping, [1, 2, 2]) == shaping
    repeated = with_seen(shaping_of(asked(repetition_penalty=1.2)), [9, 2, 2, 1])
    assert repeated.seen == (1, 2, 9)


def test_a_completion_can_be_constrained_too(allows):
    request = msgspec.convert({"model": "m", "prompt": "x", "structured_outputs": {"choice": ["a"]}}, CompletionRequest)
    assert constraint_of(request, [], HERMES) == Constraint(ConstraintKind.REGEX, "a")


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        (HERMES, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "Rome"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>'),
        (HERMES, "<tool_call>" + "[" * 5000),
        (LLAMA3, '{"name": "Bob", "age": 3}'),
        (LLAMA3, "[" * 5000),
        (MISTRAL, '[{"name": "f", "arguments": null}]'),
    ],
    ids=lambda each: str(each)[:40] if isinstance(each, str) else each.name,
)
def test_what_is_no_call_of_an_offered_tool_is_text_and_can_be_sent(style, answer):
    text, _, calls = read(AnswerReader(style.reader(OFFERED)), list(cut(random.Random(1), answer)))
    assert (text, calls) == (answer, [])
    msgspec.json.encode(text)


def test_an_argument_may_hold_the_tags_themselves():
    inner = "a <think> b </tool_call> c <tool_call>"
    answer = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': {'s': inner}})}\n</tool_call>"
    for seed in range(20):
        reader = AnswerReader(HERMES.reader(OFFERED), Thoughts(is_thinking=False))
        assert read(reader, list(cut(random.Random(seed), answer))) == ("", "", [("f", {"s": inner})])


def test_no_more_calls_than_asked_for():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert len(read(AnswerReader(HERMES.reader(OFFERED), max_calls=1), [call, call])[2]) == 1


def test_arguments_as_text_are_those_of_the_text():
    assert read(AnswerReader(LLAMA3.reader(OFFERED)), ['{"name": "f", "arguments": "{\\"a\\": 1}"}'])[2] == [
        ("f", {"a": 1})
    ]


@pytest.mark.parametrize("style", [HERMES, LLAMA3, MISTRAL], ids=lambda style: style.name)
def test_schemas_of_tools_may_refer_to_parts_of_their_own(allows, style):
    part = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    nested = Tool(
        name="nest",
        description="",
        parameters={
            "$defs": {"P": part},
            "type": "object",
            "properties": {"p": {"$ref": "#/$defs/P"}},
            "required": ["p"],
            "additionalProperties": False,
        },
    )
    constraint = constraint_of(asked(tools=TOOLS, tool_choice="required"), [ADD, nested], style)
    written = json.dumps({"name": "nest", style.key: {"p": {"x": 1}}})
    written = f"[{written}]" if style.is_list else written
    assert allows(constraint, f"{style.begin}\n{written}\n{style.end}" if style.begin else written)


def test_mistrals_templates_get_ids_that_they_take():
    messages = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_0123456789abcdef", "function": {"name": "f"}}],
        },
        {"role": "tool", "content": "x", "tool_call_id": "call_0123456789abcdef"},
    ]
    told = MISTRAL.with_tools(messages, [])
    assert told[0]["tool_calls"][0]["id"] == told[1]["tool_call_id"]
    assert len(told[1]["tool_call_id"]) == 9
    assert told[1]["tool_call_id"].isalnum()


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (ConstraintKind.GRAMMAR, "root ::= ["),
        (ConstraintKind.GRAMMAR, "root ::= a"),
        (ConstraintKind.JSON_SCHEMA, "[" * 2000),
        (
            ConstraintKind.JSON_SCHEMA,
            json.dumps({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(13, 30)]}),
        ),
    ],
    ids=["gbnf", "gbnf-name", "nested", "intersections"],
)
def test_a_form_that_cannot_be_compiled_or_would_take_all_memory_is_refused(smollm, kind, source):
    grammar = ModelGrammars(smollm.folder, 49152).grammar(Constraint(kind, source), (2,))
    with pytest.raises(ConfigError, match="cannot be"):
        grammar.start()


@pytest.mark.parametrize(
    "items",
    [
        [{"type": "function_call", "call_id": "x" * 300, "name": "f"}],
        [{"type": "function_call", "call_id": "x", "name": None}],
        [{"type": "function_call", "call_id": "x", "name": "f"}] * 129,
        [{"type": "item_reference", "id": "x"}],
        [{"type": "function_call_output", "call_id": 7, "output": "x"}],
        [{"role": "pirate", "content": "x"}],
        [{"role": "user", "content": [7]}],
    ],
)
def test_wrong_items_of_a_conversation_are_refused(items):
    with pytest.raises(ApiError, match="input"):
        messages_of(items)


def test_kept_conversations_are_each_clients_own_and_end():
    now = [0.0]
    kept = KeptConversations(lambda: now[0])
    said = [ChatMessage(role="user", content="hi")]
    kept.keep("alice", "r1", said)
    for number in range(2000):
        kept.keep("bob", f"b{number}", said)
    assert kept.of("alice", "r1") == said
    with pytest.raises(ApiError):
        kept.of("bob", "r1")
    with pytest.raises(ApiError):
        kept.of("bob", "b0")
    now[0] = 3600.0
    with pytest.raises(ApiError, match="kept for an hour"):
        kept.of("alice", "r1")
