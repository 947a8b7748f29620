"""The gateway's parts without a swarm: stop strings, keys, limits, admission."""

import json
import re
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from swarms import TEST_MODEL
from toy import plain_text
from toy_swarm import PROMPT, toy_swarm

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.errors import CapacityError, ConfigError
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.session.effects import Emit
from dsd_p2p.types import Sampling, Span, TextRequest
from dsd_p2p.window.static import StaticPolicy, sync_chain
from node.config.relaxation import bundled_relaxation
from node.gateway.admission import Admission, PatientBackend
from node.gateway.answering import GatewayLimits, Served
from node.gateway.app import Gateway
from node.gateway.backend import EngineBackend, Outcome
from node.gateway.choice import StopStrings
from node.gateway.errors import ApiError
from node.gateway.keys import ApiKey, Client, Clients, read_keys
from node.gateway.server import check_exposure, serve_gateway
from node.lab.audited.lies import LIES
from node.lab.audited.swarm import audited_swarm
from node.watch.hub import EventHub


@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_wherever_the_pieces_are_cut(pieces, stops):
    whole = "".join(pieces)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    stopper, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += stopper.feed(piece)
        # Never more than may be shown, whatever comes.
        assert whole.startswith(shown)
        if stopper.is_found:
            break
    shown += stopper.rest()
    if stopper.is_found:
        assert found
        assert not any(stop in shown for stop in stops)
        assert re.match(re.escape(shown) + f"({'|'.join(map(re.escape, stops))})", whole)
    else:
        assert shown == whole
        assert not found


def write_keys(folder, text):
    file = folder / "keys.toml"
    file.write_text(text)
    return file


def test_keys_are_checked(tmp_path):
    secret = "sk-0123456789abcdef"  # noqa: S105
    file = write_keys(tmp_path, f'[[key]]\nname = "alice"\nkey = "{secret}"\nrequests_per_minute = 2\n')
    clients = Clients(read_keys(file))
    alice = clients.identify({"authorization": f"Bearer {secret}"})
    assert alice.name == "alice"
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {secret}"},
        {"authorization": secret},
    ):
        with pytest.raises(ApiError) as caught:
            clients.identify(headers)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert Clients([]).identify({}).name == "anybody"


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "key = []\n",
        "[[key]]\nname = 'a'\n",
        "[[key]]\nname = 'a'\nkey = 'short'\n",
        "[[key]]\nname = 'a'\nkey = '0123456789abcdef'\nsha256 = '" + "0" * 64 + "'\n",
        "[[key]]\nname = 'a'\nkey = '0123456789abcdef'\n[[key]]\nname = 'a'\nkey = '0123456789abcdeg'\n",
        "[[key]]\nname = 'a'\nkey = '0123456789abcdef'\ntypo = 1\n",
    ],
)
def test_a_wrong_file_of_keys_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match="API keys"):
        read_keys(write_keys(tmp_path, text))


def test_limits_have_openais_headers():
    client = Client("alice", requests_per_minute=3, tokens_per_minute=100)
    client.begin()
    client.take(40)
    headers = client.headers()
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "2"
    assert headers["x-ratelimit-remaining-tokens"] == "60"
    client.spend(80)
    with pytest.raises(ApiError) as caught:
        client.take(1)
    assert (caught.value.status, caught.value.code, caught.value.kind) == (429, "rate_limit_exceeded", "tokens")
    assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
    other = Client("bob", requests_per_minute=1)
    other.begin()
    other.take(10**6)
    with pytest.raises(ApiError, match="requests a minute"):
        other.begin()
    assert Client("free").headers() == {}


def test_nobody_is_let_in_from_the_network_without_keys():
    check_exposure("127.0.0.1", needs_keys=False)
    check_exposure("192.0.2.1", needs_keys=True)
    with pytest.raises(ConfigError, match="--api-keys"):
        check_exposure("192.0.2.1", needs_keys=False)


async def test_whoever_has_least_running_comes_first():
    admission = Admission(max_running=2, max_waiting=10, timeout_s=5)
    order: list[str] = []
    release = trio.Event()

    async def hold(owner: str) -> None:
        async with admission.enter(owner):
            order.append(owner)
            await release.wait()

    async with trio.open_nursery() as nursery:
        for owner in ("greedy", "greedy", "greedy", "greedy", "modest"):
            nursery.start_soon(hold, owner)
            await trio.testing.wait_all_tasks_blocked()
        assert (admission.num_running, admission.num_waiting) == (2, 3)
        release.set()
    # The two that became free at the same moment start in any order.
    assert order[:2] == ["greedy", "greedy"]
    assert "modest" in order[2:4]
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_waiting_is_bounded_in_number_and_time(autojump_clock):
    admission = Admission(max_running=1, max_waiting=1, timeout_s=5)
    async with admission.enter("a"), trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(CapacityError, match="5 s"):
                async with admission.enter("b"):
                    pass

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CapacityError, match="are waiting already"):
            async with admission.enter("c"):
                pass
    # Who gives up leaves nothing behind.
    with trio.move_on_after(1):
        async with admission.enter("a"):
            await trio.sleep(2)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


class Letters:
    """A tokenizer of letters."""

    stop_tokens = ()
    template = "{{ messages }}"

    def encode(self, text, *, is_raw):
        return [ord(letter) for letter in text]

    def encode_chat(self, messages, template_values=None, tools=()):
        return [ord(letter) for message in messages for letter in message["content"]]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def token_text(self, token):
        return chr(token)

    def streamer(self):
        return self

    def step(self, token):
        return chr(token)

    def finish(self):
        return ""


class NoGrammars:
    """Refuses every constraint."""

    def grammar(self, constraint, stop_tokens):
        return self

    def start(self):
        raise ConfigError("the regex cannot be used: no")


class EchoBackend:
    async def write(self, prompt, options, outcome):
        yield Emit(tokens=tuple(prompt[: options.text.max_tokens]))


def make_gateway(keys=(), **limits):
    served = Served(
        name="echo",
        key=TEST_MODEL,
        max_positions=64,
        vocab_size=128,
        text=Letters(),
        sampling=Sampling(),
        grammars=NoGrammars(),
    )
    return Gateway(
        backend=EchoBackend(),
        served=served,
        clients=Clients(list(keys)),
        hub=EventHub(),
        metrics=lambda: b"",
        is_ready=lambda: True,
        limits=GatewayLimits(**limits),
    )


@asynccontextmanager
async def http(keys=(), **limits):
    gateway = make_gateway(keys, **limits)
    transport = httpx.ASGITransport(gateway.app(["test"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        client.gateway = gateway
        yield client


ASKED = {"model": "echo", "prompt": "hello", "max_tokens": 5}


async def test_without_a_key_nothing_is_told_and_with_one_no_more_than_its_limit():
    key = ApiKey(name="alice", key="0123456789abcdef", requests_per_minute=3, tokens_per_minute=12)
    refused: list[int] = []
    async with http([key]) as client:
        client.gateway.note_refused = refused.append
        for path in ("/v1/models", "/v1/status", "/v1/events", "/metrics"):
            reply = await client.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.post("/v1/completions", json=ASKED)).status_code == 401
        client.headers["Authorization"] = "Bearer 0123456789abcdef"
        reply = await client.post("/v1/completions", json=ASKED)
        assert reply.json()["choices"][0]["text"] == "hello"
        assert reply.headers["x-ratelimit-remaining-requests"] == "2"
        assert reply.headers["x-ratelimit-remaining-tokens"] == "2"
        # Five tokens asked and five written leave two of twelve: not enough for another five.
        reply = await client.post("/v1/completions", json=ASKED)
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "tokens")
        assert int(reply.headers["retry-after"]) >= 1
        # What is refused counts, too: the third request is the last.
        assert (await client.post("/v1/completions", json={"nonsense": 1})).status_code == 400
        reply = await client.post("/v1/completions", json={"nonsense": 1})
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "requests")
    assert refused == [401] * 5 + [429, 400, 429]


@pytest.mark.parametrize("prompt", ["", ["hello", ""], [[]], [128], [[1, 2], [3, 1 << 40]], "\N{SNOWMAN}"])
async def test_a_prompt_of_no_tokens_or_of_none_of_the_models_is_the_clients_mistake(prompt):
    async with http() as client:
        reply = await client.post("/v1/completions", json=ASKED | {"prompt": prompt, "echo": True})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "prompt" in reply.json()["error"]["message"]


async def test_a_failure_that_nobody_foresaw_is_logged_told_and_counted(caplog):
    statuses: list[int] = []

    class BrokenBackend:
        async def write(self, prompt, options, outcome):
            yield Emit(tokens=(104,))
            raise KeyError("unforeseen")

    async with http() as client:
        client.gateway.answering = replace(client.gateway.answering, backend=BrokenBackend())
        client.gateway.note = lambda _writing, status: statuses.append(status)
        whole = await client.post("/v1/completions", json=ASKED)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        streamed = await client.post("/v1/completions", json=ASKED | {"stream": True})
        *_, last = streamed.text.strip().split("\n\n")
        assert "the gateway failed" in last
    assert statuses == [500, 500]
    assert "unforeseen" in caplog.text


async def test_the_door_speculates_only_where_that_helps_all():
    async with toy_swarm() as swarm:
        backend = EngineBackend(swarm.engine, lambda: StaticPolicy(sync_chain(4)))
        modes = []
        for allows in (True, False):
            swarm.engine._governor.allows = lambda _now_s, allows=allows: allows
            outcome = Outcome()
            pieces = [
                piece
                async for piece in backend.write(PROMPT, GenerateOptions(text=TextRequest(max_tokens=12)), outcome)
            ]
            assert [token for piece in pieces for token in piece.tokens] == plain_text(PROMPT, 12)
            modes.append(outcome.statistics.details.decision.mode)
    assert modes == ["sync", "plain"]


class FullDoor:
    def __init__(self, num_refusals: int) -> None:
        self.num_refusals = num_refusals

    async def write(self, prompt, options, outcome):
        if self.num_refusals:
            self.num_refusals -= 1
            raise CapacityError("the cache is full")
        yield Emit(tokens=(1, 2))


async def test_a_full_cache_is_waited_for(autojump_clock):
    options = GenerateOptions(text=TextRequest(max_tokens=2))
    pieces = [piece async for piece in PatientBackend(FullDoor(4), 10).write([1], options, Outcome())]
    assert pieces == [Emit(tokens=(1, 2))]
    with pytest.raises(CapacityError, match="full"):
        [piece async for piece in PatientBackend(FullDoor(99), 10).write([1], options, Outcome())]


CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}, "tools": [], "tool_choice": None, "response_format": None, "stop": [], "metadata": {}},
        {"stop": None, "seed": None, "n": None, "stream": None, "stream_options": None, "user": None, "logprobs": None},
        {"logprobs": False, "top_logprobs": 0, "functions": [], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}]}]},
        {"messages": [{"role": "user", "content": "hi", "name": None, "annotations": None, "audio": None}]},
    ],
)
async def test_null_neutral_and_unknown_harmless_values_are_accepted(fields):
    async with http() as client:
        reply = await client.post("/v1/chat/completions", json=CHAT | fields)
        assert (reply.status_code, reply.json().get("error")) == (200, None)
        assert "x-dsd-ignored" not in reply.headers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3),
        ("logit_bias", {"5": 101}),
        ("functions", [{"name": "f"}]),
        ("relaxed", -0.1),
        ("relaxed", 11),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(field, value):
    async with http() as client:
        reply = await client.post("/v1/chat/completions", json=CHAT | {field: value})
        assert (reply.status_code, reply.json()["error"]["param"].split(".")[0].split("[")[0]) == (400, field)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_unknown_field_is_ignored_and_named_or_refused(is_stream):
    asked = CHAT | {"nonsense": 1, "näxt": 2, "stream": is_stream}
    async with http() as client:
        reply = await client.post("/v1/chat/completions", json=asked)
        assert (reply.status_code, reply.headers["x-dsd-ignored"]) == (200, "nonsense, n?xt")
    async with http(is_strict=True) as client:
        reply = await client.post("/v1/chat/completions", json=asked)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "nonsense")


async def test_another_path_method_or_host_gets_an_error_that_says_what_there_is():
    async with http() as client:
        for path in ("/v1/embeddings", "/v1/audio/speech", "/api/generate"):
            reply = await client.post(path, json=CHAT)
            assert reply.status_code == 404
            assert path in reply.json()["error"]["message"]
            assert "/v1/chat/completions" in reply.json()["error"]["message"]
        reply = await client.get("/v1/chat/completions")
        assert (reply.status_code, reply.json()["error"]["type"]) == (405, "invalid_request_error")
        reply = await client.get("/v1/models", headers={"Host": "evil.example:80"})
        assert reply.status_code == 400
        assert "--names evil.example" in reply.json()["error"]["message"]


async def test_a_model_says_its_context_formats_and_defaults():
    async with http(default_tokens=7) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["max_model_len"], model["weights"], model["compute"]) == (64, TEST_MODEL.weights, TEST_MODEL.compute)
    assert model["defaults"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 7}


async def test_a_stream_that_waits_sends_its_headers_and_then_comments(autojump_clock):
    """A proxy that sees no byte for half a minute gives up."""
    sent: list[tuple[float, bytes]] = []

    class SlowBackend:
        async def write(self, prompt, options, outcome):
            await trio.sleep(35)
            yield Emit(tokens=(104,))

    gateway = make_gateway()
    gateway.answering = replace(gateway.answering, backend=SlowBackend())
    body = json.dumps(CHAT | {"stream": True}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if not messages:
            await trio.sleep_forever()
        return messages.pop()

    async def send(message):
        sent.append((trio.current_time(), message.get("body", b"headers")))

    start = trio.current_time()
    await gateway.app(["test"])(scope, receive, send)
    times = [round(at - start) for at, body in sent if body == b"headers" or body.startswith(b":")]
    assert times == [1, 1, 11, 21, 31]
    assert sent[-1][1] == b"data: [DONE]\n\n"


async def test_an_error_that_comes_at_once_has_its_own_status(autojump_clock):
    async with http() as client:
        client.gateway.answering = replace(client.gateway.answering, backend=FullDoor(1 << 30))
        reply = await client.post("/v1/completions", json=ASKED | {"stream": True})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")


async def test_tool_calls_of_earlier_answers_reach_the_template():
    seen: list[dict[str, object]] = []

    class Listening(Letters):
        template = "{{ tools }} <tool_call>"

        def encode_chat(self, messages, template_values=None, tools=()):
            seen.extend(messages)
            return [104]

    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "function_call": None},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "tool_calls": None, "annotations": []},
    ]
    async with http() as client:
        served = replace(client.gateway.served, text=Listening())
        client.gateway.answering = replace(client.gateway.answering, served=served)
        reply = await client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert reply.status_code == 200
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "tool", "assistant"]
    assert seen[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert seen[3] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


async def test_it_listens_on_ipv6():
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_gateway, make_gateway(), "::1", 0)
        assert url.startswith("http://[::1]:")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/healthz")).json() == {"status": "ok"}
        nursery.cancel_scope.cancel()


async def test_a_key_sees_what_others_do_only_if_it_may_watch():
    keys = (ApiKey(name="alice", key="a" * 16), ApiKey(name="operator", key="o" * 16, watch=True))
    alice, operator = ({"authorization": f"Bearer {letter * 16}"} for letter in "ao")
    async with http(keys) as client:
        for path in ("/v1/status", "/v1/events", "/metrics"):
            asked = await client.get(path, headers=alice)
            assert (asked.status_code, "watch = true" in asked.text) == (403, True)
        for path in ("/v1/status", "/metrics"):
            assert (await client.get(path, headers=operator)).status_code == 200


async def test_a_budget_makes_an_answer_relaxed():
    asked = []

    class NotingBackend(EchoBackend):
        def write(self, prompt, options, outcome):
            asked.append(options.text.relaxation)
            return super().write(prompt, options, outcome)

    async with http() as client:
        client.gateway.answering = replace(client.gateway.answering, backend=NotingBackend())
        for budget in (None, 0, 0.05):
            assert (await client.post("/v1/chat/completions", json=CHAT | {"relaxed": budget})).status_code == 200
        reply = await client.post("/v1/chat/completions", json=CHAT | {"relaxed": 0.05, "audit": True})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "relaxed")
    assert asked[:2] == [None, None]
    assert asked[2] == bundled_relaxation(0.05)
    assert asked[2].budget == 0.05


async def test_what_nobody_can_check_is_not_audited():
    async with toy_swarm() as swarm, http() as client:
        backend = EngineBackend(swarm.engine, lambda: StaticPolicy(sync_chain(2)))
        client.gateway.answering = replace(client.gateway.answering, backend=backend)
        reply = await client.post("/v1/completions", json=ASKED | {"prompt": [1, 2, 3], "audit": True})
        assert reply.status_code == 503
        assert "an audit needs a second peer" in reply.json()["error"]["message"]


async def test_an_audited_answer_says_what_was_checked(tiny):
    asked = {"model": "echo", "prompt": [5, 9, 2, 77], "max_tokens": 12, "temperature": 0, "audit": True}
    source = find_model(str(tiny("llama")), NoProgress())
    spans = [Span(0, 2), Span(2, 4)]
    async with audited_swarm(source, spans, NgramDrafter()) as swarm, http() as client:
        backend = EngineBackend(swarm.engine, lambda: StaticPolicy(sync_chain(2)))
        client.gateway.answering = replace(client.gateway.answering, backend=backend)
        reply = await client.post("/v1/completions", json=asked)
        assert reply.status_code == 200, reply.text
        (audited,) = reply.json()["usage"]["audit"]
        assert audited["is_checked"]
        assert audited["num_checks"] >= 3
        reply = await client.post("/v1/completions", json=asked | {"audit": False})
        assert "audit" not in reply.json()["usage"]
        swarm.stages[0].model.lie = LIES[0]
        reply = await client.post("/v1/completions", json=asked)
        assert reply.status_code == 503
        assert "cannot be trusted" in reply.json()["error"]["message"]
