"""The chat in the terminal: what is said, what commands do, what is shown of answers, reasoning and errors."""

import io
import json

import httpx
import pytest
from rich.console import Console

from dsd_p2p.errors import ConfigError, PeerDisconnected
from node.client.chat import Chat, harmless, typed_lines
from node.client.conversation import Conversation, GatewayClient

SPECULATION = {"tokens_per_s": 12.5, "ttft_s": 0.2, "mode": "sync", "drafter": "x", "mean_accepted_length": 2.0}
USAGE = {
    "completion_tokens": 2,
    "prompt_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 4},
    "speculation": [SPECULATION],
}


class Gateway:
    """Answers every question with its number, and notes the requests."""

    def __init__(self):
        self.requests = []
        self.break_after = 99
        self.status = 200

    def __call__(self, request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        self.requests.append(json.loads(request.content))
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "too much"}})
        deltas = ({"role": "assistant"}, {"reasoning_content": "hm "}, {"content": "answer "})
        events = [{"choices": [{"delta": delta}]} for delta in (*deltas, {"content": str(len(self.requests))})]
        events.append({"choices": [], "usage": USAGE})
        if len(events) > self.break_after:
            events = [*events[: self.break_after], {"error": {"message": "the route is lost"}}]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=f": waiting\n\n{lines}data: [DONE]\n\n")


@pytest.fixture
def gateway():
    return Gateway()


def talk(gateway, *lines, **fields):
    """Return what the terminal shows, and the conversation."""
    client = GatewayClient("http://test/v1/", transport=httpx.MockTransport(gateway))
    shown = io.StringIO()
    conversation = Conversation(model=client.model(), **fields)
    console = Console(file=shown, width=200, highlight=False)
    Chat(client=client, conversation=conversation, console=console).run(iter(lines))
    client.close()
    return shown.getvalue(), conversation


def test_a_conversation_grows_and_each_answer_says_how_fast_it_was(gateway):
    shown, conversation = talk(gateway, "one", "  ", "two")
    assert "hm answer 1\n" in shown
    assert "hm answer 2\n" in shown
    assert "2 tokens · 12.5 tokens/s, first after 0.2 s · sync with x, 2.0 tokens an epoch" in shown
    assert "4 of 9 prompt tokens were still held" in shown
    assert [each["content"] for each in gateway.requests[1]["messages"]] == ["one", "answer 1", "two"]
    assert conversation.said[-1] == {"role": "assistant", "content": "answer 2"}
    assert not {"temperature", "seed", "max_tokens"} & gateway.requests[0].keys()


def test_commands_change_what_is_asked(gateway):
    shown, _ = talk(
        gateway, "/seed 7", "/temperature 0", "/system Be brief.", "hi", "/new", "/seed", "/temperature", "ho"
    )
    first, second = gateway.requests
    assert (first["seed"], first["temperature"]) == (7, 0.0)
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [each["content"] for each in second["messages"]] == ["Be brief.", "ho"]
    assert not {"temperature", "seed"} & second.keys()
    assert "forgotten" in shown


def test_a_question_is_asked_again_in_place_of_its_answer(gateway):
    shown, conversation = talk(gateway, "/retry", "one", "/retry")
    assert "nothing was asked yet" in shown
    assert gateway.requests[0]["messages"] == gateway.requests[1]["messages"]
    assert [each["content"] for each in conversation.said] == ["one", "answer 2"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sing", "there is no /sing"),
        ("/seed x", "is no seed"),
        ("/temperature warm", "is no temperature"),
        ("/temperature 3", "is no temperature"),
        ("/help", "/retry"),
    ],
)
def test_what_cannot_be_obeyed_is_said(gateway, line, words):
    shown, _ = talk(gateway, line)
    assert words in shown
    assert gateway.requests == []


def test_the_user_leaves(gateway):
    talk(gateway, "one", "/quit", "two")
    assert len(gateway.requests) == 1


def test_a_refused_question_is_no_part_of_the_conversation(gateway):
    gateway.status = 429
    shown, conversation = talk(gateway, "one")
    assert "the gateway refuses: too much" in shown
    assert conversation.said == []


def test_what_was_read_of_an_answer_that_broke_off_stays(gateway):
    gateway.break_after = 3
    shown, conversation = talk(gateway, "one")
    assert "the route is lost" in shown
    assert conversation.said[-1] == {"role": "assistant", "content": "answer "}


def test_ctrl_c_stops_an_answer_but_not_the_chat(gateway):
    client = GatewayClient("http://test", transport=httpx.MockTransport(gateway))
    shown = io.StringIO()

    class Interrupting(Console):
        def print(self, *args, **options):
            super().print(*args, **options)
            if args and "answer" in str(args[0]) and len(gateway.requests) == 1:
                raise KeyboardInterrupt

    chat = Chat(client=client, conversation=Conversation(model="tiny"), console=Interrupting(file=shown, width=100))
    chat.run(iter(["one", "two"]))
    client.close()
    assert "stopped" in shown.getvalue()
    assert chat.conversation.said[1] == {"role": "assistant", "content": "answer "}
    assert len(gateway.requests) == 2


def test_an_address_without_a_gateway_is_an_error_that_says_what_to_do():
    client = GatewayClient("http://127.0.0.1:9")
    with pytest.raises(PeerDisconnected, match="start one with `dsd up`"):
        client.model()
    client.close()
    client = GatewayClient(
        "http://test", transport=httpx.MockTransport(lambda _request: httpx.Response(401, text="no"))
    )
    with pytest.raises(ConfigError, match="status 401"):
        client.model()
    client.close()


def test_lines_come_from_a_pipe_too(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert list(typed_lines(tmp_path / "history")) == ["one", "two"]
    assert not (tmp_path / "history").exists()


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert harmless("\x1b]52;c;ZXZpbA==\x07hi\x1b[2J\n\tüb\x9b1m") == "]52;c;ZXZpbA==hi[2J\n\tüb1m"
