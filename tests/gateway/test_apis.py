"""The APIs that agents speak, by the official clients: forms by construction, tools, streams, turns, errors."""

import asyncio
import json
import subprocess
import sys

import anthropic
import httpx
import ollama
import openai
import pytest
from pydantic import BaseModel

MODEL = "smollm2-135m"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 16}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds two numbers", "parameters": ADD}},
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
]
BOB = [{"role": "user", "content": "Bob is 33 years old. Describe him."}]

pytestmark = pytest.mark.xdist_group("gateway")


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def client(up):
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def claude(up):
    with anthropic.Anthropic(base_url=up.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def llama(up):
    with ollama.Client(up.url) as client:
        yield client


def chat(client, messages=None, **options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages or BOB, "max_tokens": 80, "temperature": 0, **options}
    )


# Chat


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_answer_has_the_form_that_was_asked_for(client, temperature, is_stream):
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    options = {"response_format": format_, "temperature": temperature, "seed": 7}
    whole = chat(client, **options).choices[0].message.content
    assert set(json.loads(whole)) == {"name", "age"}
    if is_stream:
        chunks = chat(client, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_other_forms(client):
    parsed = client.chat.completions.parse(
        model=MODEL, messages=BOB, response_format=Person, max_tokens=120, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    chosen = chat(client, extra_body={"structured_outputs": {"choice": ["young", "old"]}})
    assert chosen.choices[0].message.content in ("young", "old")
    matched = chat(client, extra_body={"structured_outputs": {"regex": "[A-Z][a-z]{2,7}, [0-9]{2}"}})
    assert matched.choices[0].message.content[-4:-2] == ", "
    text = client.completions.create(
        model=MODEL, prompt="Bob is", max_tokens=20, extra_body={"structured_outputs": {"choice": [" young", " old"]}}
    )
    assert text.choices[0].text in (" young", " old")


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_tools_are_called_in_turn(client, is_stream):
    messages = [{"role": "user", "content": "Add 2 and 3, then tell me the weather in Rome."}]
    for name, keys in (("add", {"a", "b"}), ("get_weather", {"city"})):
        options = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": name}}}
        if is_stream:
            with client.chat.completions.stream(
                model=MODEL, messages=messages, max_tokens=80, temperature=0, **options
            ) as stream:
                choice = stream.get_final_completion().choices[0]
        else:
            choice = chat(client, messages, **options).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        called = choice.message.tool_calls
        assert {call.function.name for call in called} == {name}
        assert all(set(json.loads(call.function.arguments)) == keys for call in called)
        messages.append({"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in called]})
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "5, sunny"} for call in called]
    answer = chat(client, messages, tools=TOOLS, tool_choice="none", max_tokens=16)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].message.tool_calls is None


def test_a_streamed_call_comes_as_openai_sends_it(client):
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "stream": True}
    deltas = [chunk.choices[0].delta for chunk in chat(client, **options)]
    (named, *given) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (named.index, named.type, named.function.arguments) == (0, "function", "")
    assert named.id.startswith("call_")
    assert all(call.id is None and call.function.name is None for call in given)
    json.loads("".join(call.function.arguments for call in given))


def test_several_answers_have_calls_of_their_own(client):
    choices = chat(client, tools=TOOLS, tool_choice="required", n=2, temperature=1.0, seed=1).choices
    ids = [call.id for choice in choices for call in choice.message.tool_calls]
    assert len(choices) == 2
    assert len(set(ids)) == len(ids)


def test_penalties_and_biases_change_the_answer_and_keep_it_reproducible(client):
    plain = chat(client).choices[0].message.content
    for options in ({"frequency_penalty": 1.5}, {"logit_bias": {"28": -100, "253": -100}}):
        first, second = (chat(client, **options).choices[0].message.content for _ in range(2))
        assert first == second != plain, options
    repeated = chat(client, extra_body={"repetition_penalty": 1.8}).choices[0].message.content
    assert repeated != plain


# Responses


def test_responses_whole_streamed_parsed_and_in_turns(client):
    options = {"model": MODEL, "max_output_tokens": 60, "temperature": 0}
    first = client.responses.create(input="Say hello.", instructions="Be brief.", **options)
    assert first.output_text
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    with client.responses.stream(input="Say hello.", instructions="Be brief.", **options) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == first.output_text
    assert events[-1].response.output_text == first.output_text
    second = client.responses.create(input="And goodbye.", previous_response_id=first.id, **options)
    assert second.usage.input_tokens > first.usage.output_tokens
    parsed = client.responses.parse(input="Bob is 33.", text_format=Person, model=MODEL, max_output_tokens=120)
    assert isinstance(parsed.output_parsed, Person)


def test_responses_call_tools_and_go_on_from_their_results(client):
    tools = [{"type": "function", "name": "add", "parameters": ADD, "strict": True}, {"type": "web_search"}]
    options = {"model": MODEL, "tools": tools, "temperature": 0, "parallel_tool_calls": False}
    raw = client.responses.with_raw_response.create(input="What is 2 + 3?", tool_choice="required", **options)
    assert raw.headers["x-dsd-ignored"] == "tools.web_search"
    first = raw.parse()
    (call,) = first.output
    assert (call.type, call.name, set(json.loads(call.arguments))) == ("function_call", "add", {"a", "b"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    second = client.responses.create(
        input=[result], previous_response_id=first.id, max_output_tokens=16, tool_choice="none", **options
    )
    assert second.output_text
    with client.responses.stream(input="What is 2 + 3?", tool_choice="required", **options) as stream:
        kinds = [event.type for event in stream]
    assert "response.function_call_arguments.delta" in kinds
    # The whole conversation may be sent instead.
    items = [{"role": "user", "content": "What is 2 + 3?"}, call.model_dump(exclude_none=True), result]
    third = client.responses.create(input=items, max_output_tokens=16, tool_choice="none", **options)
    assert third.output_text == second.output_text


def test_what_responses_cannot_do_is_said(client):
    with pytest.raises(openai.NotFoundError, match="is not kept here"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_unknown")
    forgotten = client.responses.create(model=MODEL, input="x", store=False, max_output_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="x", previous_response_id=forgotten.id)
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]
    with pytest.raises(openai.BadRequestError, match="only text is"):
        client.responses.create(model=MODEL, input=image)


def test_an_answer_is_as_long_as_the_context_allows_where_clients_must_name_a_length(client, claude, llama):
    """Agents name the length of models that they know, such as 32,000 tokens."""
    question = [{"role": "user", "content": "Say yes."}]
    limits = {"stop_sequences": [" ", "."], "model": MODEL, "messages": question}
    assert claude.messages.create(max_tokens=100_000, **limits).stop_reason in ("stop_sequence", "end_turn")
    options = {"num_predict": 100_000, "stop": [" ", "."]}
    assert llama.chat(MODEL, question, options=options).done_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(client, question, max_tokens=100_000)


def test_the_kind_of_a_tool_that_no_header_can_carry_is_named_as_far_as_one_can(client):
    tools = [{"type": "web\r\nsearch-ü" * 40}]
    raw = client.responses.with_raw_response.create(model=MODEL, input="x", tools=tools, max_output_tokens=2)
    assert raw.headers["x-dsd-ignored"].startswith("tools.web??search-?web")
    assert len(raw.headers["x-dsd-ignored"]) == 64


# Messages


def test_messages_whole_and_streamed(claude):
    asked = {"model": MODEL, "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}
    greedy = {"extra_body": {"temperature": 0}}
    whole = claude.messages.create(system="Be brief.", **asked, **greedy)
    (block,) = whole.content
    assert (whole.role, block.type) == ("assistant", "text")
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.output_tokens > 0
    events = list(claude.messages.create(system="Be brief.", stream=True, **asked, **greedy))
    assert [event.type for event in events][:2] == ["message_start", "content_block_start"]
    assert [event.type for event in events][-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == block.text
    assert claude.messages.count_tokens(model=MODEL, messages=asked["messages"]).input_tokens > 5
    word = block.text.split()[1]
    stopped = claude.messages.create(system="Be brief.", stop_sequences=[word], **asked, **greedy)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_messages_call_tools_and_go_on_from_their_results(claude):
    tools = [{"name": "add", "description": "Adds two numbers", "input_schema": ADD}]
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    must = {"type": "any", "disable_parallel_tool_use": True}
    options = {"model": MODEL, "max_tokens": 80, "tools": tools, "extra_body": {"temperature": 0}}
    with claude.messages.stream(messages=messages, tool_choice=must, model=MODEL, max_tokens=80, tools=tools) as stream:
        assert stream.get_final_message().stop_reason == "tool_use"
    first = claude.messages.create(messages=messages, tool_choice=must, **options)
    (use,) = first.content
    assert (first.stop_reason, use.type, use.name, set(use.input)) == ("tool_use", "tool_use", "add", {"a", "b"})
    messages.append({"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "5"}]}
    messages.append({"role": "user", "content": [result, {"type": "text", "text": "So?"}]})
    second = claude.messages.create(messages=messages, tool_choice={"type": "none"}, **options)
    assert [block.type for block in second.content] == ["text"]
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    formed = claude.messages.create(model=MODEL, max_tokens=80, messages=BOB, output_config=form)
    assert set(json.loads(formed.content[0].text)) == {"name", "age"}


def test_errors_of_messages_are_anthropics(claude, up):
    asked = {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(anthropic.NotFoundError, match="is not served here") as caught:
        claude.messages.create(model="claude", **asked)
    assert caught.value.body["error"]["type"] == "not_found_error"
    image = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]
    with pytest.raises(anthropic.BadRequestError, match="'image' are not supported"):
        claude.messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": image}])
    reply = httpx.post(f"{up.url}/v1/messages", json={"model": MODEL, "messages": []})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


# Ollama, and tokens


def test_ollamas_client_lists_chats_streams_forms_and_calls(llama):
    (model,) = llama.list().models
    assert model.model == MODEL
    options = {"num_predict": 24, "temperature": 0}
    question = [{"role": "user", "content": "Say hello."}]
    whole = llama.chat(f"{MODEL}:latest", question, options=options)
    assert whole.message.content
    assert whole.eval_count > 0
    lines = list(llama.chat(MODEL, question, options=options, stream=True))
    assert "".join(line.message.content for line in lines) == whole.message.content
    assert [line.done for line in lines][-2:] == [False, True]
    formed = llama.chat(MODEL, BOB, format=PERSON, options={"num_predict": 80, "temperature": 0})
    assert set(json.loads(formed.message.content)) == {"name", "age"}
    told = [
        *BOB,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
        },
        {"role": "tool", "content": "3", "tool_name": "add"},
    ]
    assert llama.chat(MODEL, told, tools=TOOLS, options=options).message.role == "assistant"
    with pytest.raises(ollama.ResponseError, match="is not served here"):
        llama.chat("other", question)


def test_tokens_are_told(up):
    def tokenize(**fields):
        return httpx.post(f"{up.url}/tokenize", json={"model": MODEL, **fields})

    raw = tokenize(prompt="Hello world").json()
    assert (raw["count"], len(raw["tokens"])) == (2, 2)
    assert tokenize(messages=BOB).json()["count"] > tokenize(prompt=BOB[0]["content"]).json()["count"]
    assert tokenize(messages=BOB, tools=TOOLS).json()["count"] > tokenize(messages=BOB).json()["count"] + 50
    assert tokenize().status_code == 400


def test_a_chat_in_the_terminal(up):
    command = [sys.executable, "-m", "node.cli", "chat", up.url, "--temperature", "0", "--max-tokens", "8"]
    lines = "Say hello.\n/seed 3\n/retry\n/quit\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("Hello")]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert done.stdout.count("tokens/s, first after") == 2


def test_an_agent_calls_a_tool_and_then_gives_its_output_by_another(up):
    """An agent framework makes its typed output a tool, and lets the model call nothing but tools."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    cities = []

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none") as client:
            model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
            settings = {"temperature": 0, "max_tokens": 120, "parallel_tool_calls": False}
            weather = Agent(model, output_type=[look_up], model_settings=settings)
            await weather.run("What is the weather in Rome?")
            person = Agent(model, output_type=Person, model_settings=settings)
            return (await person.run("Bob is 33 years old.")).output

    def look_up(city: str) -> str:
        """Return the weather of a city."""
        cities.append(city)
        return "sunny"

    assert isinstance(asyncio.run(ask()), Person)
    assert len(cities) == 1


def test_a_form_that_shows_itself_impossible_is_the_requests_error(client):
    with pytest.raises(openai.BadRequestError, match="allows no token here"):
        chat(client, extra_body={"structured_outputs": {"choice": ["a"]}, "min_tokens": 50})
