"""A conversation with a gateway: what was said, how the next answer is sampled, and the answers as they arrive."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from dsd_p2p.errors import ConfigError, PeerDisconnected

_SILENCE_S, _CONNECT_S = 120.0, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The next part of an answer."""

    text: str = ""
    reasoning: str = ""


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said so far, and how to answer.

    system: instructions before everything. seed: None for another one each time. temperature: None for the model's own.
    last: what the gateway told of the last answer (`usage`).
    """

    model: str
    system: str = ""
    seed: int | None = None
    temperature: float | None = None
    max_tokens: int = 0
    said: list[dict[str, str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin anew."""
        self.said.clear()

    def take_back(self) -> str:
        """Take the last question and its answer back, and return the question; empty if there is none."""
        while self.said and self.said[-1]["role"] == "assistant":
            self.said.pop()
        return self.said.pop()["content"] if self.said else ""

    @property
    def request(self) -> dict[str, Any]:
        """The body of the next request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *self.said],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        chosen = {"seed": self.seed, "temperature": self.temperature, "max_tokens": self.max_tokens or None}
        return body | {name: value for name, value in chosen.items() if value is not None}

    @property
    def speed(self) -> str:
        """How the last answer came about, in one line; empty if there is none."""
        usage = self.last
        if not usage:
            return ""
        words = [f"{usage['completion_tokens']} tokens"]
        for each in usage.get("speculation", [])[:1]:
            words.append(f"{each['tokens_per_s']:.1f} tokens/s, first after {each['ttft_s']:.1f} s")
            if each["mode"]:
                words.append(
                    f"{each['mode']} with {each['drafter']}, {each['mean_accepted_length']:.1f} tokens an epoch"
                )
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        if cached:
            words.append(f"{cached} of {usage['prompt_tokens']} prompt tokens were still held")
        return " · ".join(words)


class GatewayClient:
    """A gateway, by its address and key. transport: what carries the requests; None for the network."""

    def __init__(self, url: str, key: str = "", transport: httpx.BaseTransport | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        self._http = httpx.Client(timeout=timeout, headers=headers, transport=transport)

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def model(self) -> str:
        """Return the name of the model that is served.

        Raises:
            PeerDisconnected: there is no gateway at the address.
            ConfigError: the gateway refuses.
        """
        try:
            reply = self._http.get(f"{self._url}/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._unreachable(exc) from exc
        _check(reply)
        try:
            return str(reply.json()["data"][0]["id"])
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            raise ConfigError(f"what answers at {self._url} is no gateway: name another address") from exc

    def ask(self, conversation: Conversation, question: str) -> Iterator[Part]:
        """Say something and yield the answer as it arrives. Both are added to the conversation once it is complete.

        Raises:
            PeerDisconnected: the gateway cannot be reached, or the answer broke off.
            ConfigError: the gateway refuses.
        """
        conversation.said.append({"role": "user", "content": question})
        text = ""
        try:
            with self._http.stream("POST", f"{self._url}/v1/chat/completions", json=conversation.request) as reply:
                if reply.is_error:
                    reply.read()
                    _check(reply)
                for line in reply.iter_lines():
                    part = _part(line, conversation)
                    text += part.text
                    yield part
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._unreachable(exc) from exc
        finally:
            # A question without an answer is not part of the conversation. What was read of an answer is.
            if text:
                conversation.said.append({"role": "assistant", "content": text})
            else:
                conversation.said.pop()

    def _unreachable(self, exc: Exception) -> PeerDisconnected:
        return PeerDisconnected(f"no gateway answers at {self._url} ({exc}): start one with `dsd up`, or name another")


def _part(line: str, conversation: Conversation) -> Part:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return Part()
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise PeerDisconnected(event["error"]["message"])
    if event.get("usage"):
        conversation.last = event["usage"]
    delta = event["choices"][0]["delta"] if event["choices"] else {}
    return Part(text=delta.get("content") or "", reasoning=delta.get("reasoning_content") or "")


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {reply.status_code}"
    raise ConfigError(f"the gateway refuses: {message}")
