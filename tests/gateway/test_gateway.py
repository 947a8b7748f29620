"""The gateway as clients use it: OpenAI's own client, curl, an agent framework, schemathesis; what is refused; what is freed."""

import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import trio
import trio.testing
from demand import IS_ALL
from hypercorn.config import Config
from upswarm import dsd_up

from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.text import TextCodec
from node.gateway.door import Door

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

_PHASES = "examples,coverage,fuzzing" if IS_ALL else "examples,fuzzing"
"""Covering every value of every field takes five minutes."""

pytestmark = pytest.mark.xdist_group("gateway")


@pytest.fixture(scope="module")
def client(up):
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **options}
    )


def test_streamed_or_whole_the_answer_is_the_same_and_says_how_it_came_about(client):
    whole = chat(client)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.choices[0].finish_reason in ("stop", "length")
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    (speculation,) = usage.model_extra["speculation"]
    assert speculation["num_windows"] > 0
    assert speculation["tokens_per_s"] > 0
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_next_turn_computes_only_what_is_new(up, client):
    first = chat(client)
    turn = [*QUESTION, {"role": "assistant", "content": first.choices[0].message.content}]
    turn.append({"role": "user", "content": "And of Spain?"})
    second = chat(client, messages=turn)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # All but the answer's last token, and what the template and the new message add.
    assert first.usage.total_tokens - 2 <= cached < second.usage.prompt_tokens
    with dsd_up("--stages", "2") as cold, openai.OpenAI(base_url=f"{cold.url}/v1", api_key="none") as fresh:
        alone = chat(fresh, messages=turn)
        assert alone.usage.prompt_tokens_details.cached_tokens == 0
        assert alone.choices[0].message.content == second.choices[0].message.content
    counted = httpx.get(f"{up.url}/metrics").text
    assert float(re.search(r"^dsd_prompt_tokens_cached_total (\S+)", counted, re.MULTILINE).group(1)) >= cached


def test_a_stop_string_ends_the_answer_before_it(client):
    text = chat(client).choices[0].message.content
    stopped = chat(client, stop=["Paris", "never"])
    assert stopped.choices[0].message.content == text[: text.index("Paris")]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(client, stop="Paris", stream=True))
    assert streamed == stopped.choices[0].message.content


def test_seeds_and_several_answers(client):
    def texts(**options):
        return [c.message.content for c in chat(client, temperature=1.0, max_tokens=16, **options).choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) > 1
    assert texts(n=3, seed=5) == three
    assert texts(seed=6)[0] == three[1]
    assert texts(seed=50) != three[:1]
    streamed = ["", "", ""]
    for chunk in chat(client, temperature=1.0, max_tokens=16, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == three


def test_log_probabilities_are_the_targets(client):
    reply = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    content = reply.choices[0].logprobs.content
    assert "".join(each.token for each in content) == reply.choices[0].message.content
    for each in content:
        assert each.logprob <= 0
        # Greedy: the token written is the likeliest.
        assert each.top_logprobs[0].token == each.token
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (t.logprob for t in each.top_logprobs), reverse=True
        )
        assert bytes(each.bytes).decode() == each.token
    streamed = [
        each
        for chunk in chat(client, logprobs=True, max_tokens=6, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]


def test_texts_are_continued_from_strings_and_from_tokens(client):
    codec = TextCodec(find_model(MODEL, NoProgress()).folder)
    prompt = "The quick brown fox"
    options = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    text = client.completions.create(prompt=prompt, **options).choices[0].text
    tokens = codec.encode(prompt, is_raw=True)
    assert client.completions.create(prompt=tokens, **options).choices[0].text == text
    two = client.completions.create(prompt=[prompt, "Once upon a time"], echo=True, logprobs=None, **options)
    assert two.choices[0].text == prompt + text
    assert two.choices[1].text.startswith("Once upon a time")
    with_logprobs = client.completions.create(prompt=prompt, logprobs=2, **options).choices[0].logprobs
    assert "".join(with_logprobs.tokens) == text
    assert len(with_logprobs.token_logprobs) == len(with_logprobs.tokens) == 8
    assert with_logprobs.text_offset[1] == len(with_logprobs.tokens[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "gpt-4o"}, "model 'gpt-4o' is not served here"),
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "role"),
        ({"max_tokens": 10**6}, "context"),
        ({"n": 99}, "n"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}}, "does not exist"),
        ({"extra_body": {"min_p": 1.5}}, "min_p"),
        ({"stop": ["a"] * 9}, "stop"),
    ],
)
def test_what_cannot_be_asked_is_an_openai_error(client, options, words):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        chat(client, **options)
    assert caught.value.status_code in (400, 404)
    assert caught.value.body["type"] == "invalid_request_error"


def sessions(up) -> int:
    status = httpx.get(f"{up.url}/v1/status").json()
    return sum(peer["num_sessions"] for peer in status["peers"])


def wait_for_sessions(up, count: int) -> None:
    deadline = time.monotonic() + 30
    while sessions(up) != count:
        assert time.monotonic() < deadline, sessions(up)
        time.sleep(0.1)


def test_a_client_that_leaves_frees_every_stage_within_a_second(client, up):
    stream = chat(client, max_tokens=900, stream=True, messages=[{"role": "user", "content": "Count to a thousand."}])
    for _ in range(4):
        next(stream)
    wait_for_sessions(up, 2)
    left_at = time.time()
    stream.close()
    with httpx.stream("GET", f"{up.url}/v1/events", timeout=20) as events:
        for line in events.iter_lines():
            event = json.loads(line[6:])["event"] if line.startswith("data: ") else {}
            if event.get("type") == "peer" and event["at_s"] > left_at + 1 and event["last"]:
                assert event["num_sessions"] == 0
                break


def test_a_client_that_leaves_before_the_first_token_frees_them_too(up):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 1500}], "max_tokens": 50}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{up.url}/v1/chat/completions", json=body, timeout=0.7)
    # Asked too early, no stage has told yet that it was opened.
    wait_for_sessions(up, 0)


def test_a_lost_stage_is_no_fault_of_the_client():
    """The node says it is not ready, and an answer is refused as the swarm's doing."""
    with dsd_up("--stages", "2", "--draft", "ngram") as up:
        assert httpx.get(f"{up.url}/readyz").status_code == 200
        launcher = next(
            child for child in psutil.Process(up.pid).children() if "node.local.stage_processes" in child.cmdline()
        )
        launcher.children()[0].kill()
        deadline = time.monotonic() + 30
        while (ready := httpx.get(f"{up.url}/readyz")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert ready.status_code == 503
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        reply = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 503, reply.text
        assert reply.json()["error"]["code"] == "swarm_unavailable"


def test_curl(up):
    body = json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{up.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-2])


def test_an_agent_frameworks_own_connector(up):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none") as client:
            agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client)))
            settings = {"temperature": 0, "max_tokens": 24}
            whole = await agent.run(QUESTION[0]["content"], model_settings=settings)
            async with agent.run_stream(QUESTION[0]["content"], model_settings=settings) as stream:
                streamed = "".join([piece async for piece in stream.stream_text(delta=True)])
            assert streamed == whole.output
            return whole.output

    assert "Paris" in asyncio.run(ask())


def test_other_sites_are_not_answered(up):
    body = json.dumps({"model": MODEL, "messages": QUESTION})
    # A form or a script of another site can send this without asking first; an answer would cost us.
    plain = httpx.post(f"{up.url}/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    asked = httpx.options(f"{up.url}/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in asked.headers
    rebound = httpx.get(f"{up.url}/v1/models", headers={"Host": "evil.example"})
    assert rebound.status_code == 400


def test_too_much_is_refused_before_it_is_read(up):
    huge = b'{"model": "' + b"x" * (5 << 20) + b'"}'
    reply = httpx.post(f"{up.url}/v1/chat/completions", content=huge, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413
    nested = httpx.post(
        f"{up.url}/v1/completions", content=b"[" * 100_000, headers={"Content-Type": "application/json"}
    )
    assert nested.status_code == 400
    assert httpx.get(f"{up.url}/readyz").status_code == 200


def test_metrics_have_the_fields_names(up, client):
    chat(client, max_tokens=4)
    text = httpx.get(f"{up.url}/metrics").text
    for name in (
        "dsd_time_to_first_token_seconds_count",
        "dsd_time_per_output_token_seconds_bucket",
        "dsd_generation_tokens_total",
        "dsd_stage_queue_windows",
        "dsd_stage_cache_bytes",
        'dsd_requests_total{status="200"}',
    ):
        assert name in text


def test_sixteen_at_once_get_what_each_gets_alone(client):
    prompts = [f"Write about the number {number}." for number in range(16)]
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        messages = [{"role": "user", "content": prompts[number]}]
        texts[number] = chat(client, messages=messages, max_tokens=16).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, texts = texts, {}
    for number in (0, 5, 15):
        ask(number)
    assert texts == {number: together[number] for number in texts}
    assert len(together) == 16


def test_the_published_schema_holds(up, tmp_path):
    """Every endpoint, with requests that the schema allows and such that it does not."""
    operations = httpx.get(f"{up.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}"} <= operations.keys()
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{up.url}/openapi.json", "--max-examples", "8", "--phases", _PHASES),
        *("--request-timeout", "60", "--seed", "1", "--suppress-health-check", "all"),
        # A right request can be too long for the model, or mix what cannot be mixed.
        *("--exclude-checks", "positive_data_acceptance"),
    ]
    env = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    answered = httpx.get(f"{up.url}/metrics").text
    assert float(re.search(r'dsd_requests_total{status="200"} (\S+)', answered).group(1)) > 10


# The door


@pytest.fixture
def slow_heads(monkeypatch):
    monkeypatch.setattr("node.gateway.door._HEAD_S", 0.5)
    monkeypatch.setattr("node.gateway.door._MAX_OF_ADDRESS", 4)


async def _hello(_scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@asynccontextmanager
async def door():
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        made = Door()
        nursery.start_soon(made.serve, _hello, Config(), listener)
        yield made, partial(trio.open_tcp_stream, "127.0.0.1", port)
        nursery.cancel_scope.cancel()


async def everything(stream):
    data = b""
    async with stream:
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            while chunk := await stream.receive_some(4096):
                data += chunk
    return data


async def test_unfinished_heads_end_and_do_not_keep_others_out(slow_heads):
    async with door() as (made, connect):
        held = [await connect() for _ in range(3)]
        for stream in held:
            await stream.send_all(b"POST / HTTP/1.1\r\nHo")
        other = await connect()
        await other.send_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await everything(other)).startswith(b"HTTP/1.1 200")
        assert all([(await everything(stream)).startswith(b"HTTP/1.1 408") for stream in held])
        assert made.num_open == 0


async def test_one_address_has_so_many_connections(slow_heads):
    async with door() as (made, connect):
        held = [await connect() for _ in range(4)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await everything(await connect())).startswith(b"HTTP/1.1 503")
        await held[0].aclose()
        with trio.fail_after(2):
            while made.num_open == 4:  # noqa: ASYNC110 - the door tells nobody
                await trio.sleep(0.02)
        other = await connect()
        await other.send_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await everything(other)).endswith(b"hi")
        for stream in held:
            await stream.aclose()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\n\r\n", b"505"),
        (b"GET / HTTP/1.1\r\nhost: " + b"x" * (70 << 10), b"408"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"200"),
    ],
    ids=["http2", "upgrade", "endless", "plain"],
)
async def test_only_whole_heads_of_http_1_come_in(slow_heads, head, status):
    async with door() as (_, connect):
        stream = await connect()
        await stream.send_all(head)
        assert (await everything(stream)).startswith(b"HTTP/1.1 " + status)


H2C = b"connection: upgrade, http2-settings\r\nupgrade:h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n"


@pytest.mark.parametrize(
    "second", [b"GET / HTTP/1.1\r\nhost: x\r\n" + H2C, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["upgrade", "preface"]
)
async def test_a_later_request_does_not_change_to_http_2(slow_heads, second):
    async with door() as (_, connect):
        stream = await connect()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        with trio.fail_after(5):
            assert b"200" in await stream.receive_some(4096)
        await stream.send_all(second)
        # Whatever was said of a change, the connection ends before a frame of HTTP/2.
        assert (await everything(stream)).rpartition(b"\r\n\r\n")[2] in (b"", b"hi")


async def test_whoever_resets_at_once_ends_nothing(slow_heads):
    async with door() as (made, connect):
        for _ in range(20):
            stream = await connect()
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await trio.aclose_forcefully(stream)
        other = await connect()
        await other.send_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await everything(other)).endswith(b"hi")
        with trio.fail_after(5):
            while made.num_open:  # noqa: ASYNC110 - the door tells nobody
                await trio.sleep(0.02)
