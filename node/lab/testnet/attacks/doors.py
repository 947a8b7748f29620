"""Attacks on the gateway, by somebody without a key and by the holder of one."""

import socket
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import trio

from node.lab.testnet.attacks.ground import Ground, NotHeld

_REQUEST = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def _place(ground: Ground) -> tuple[str, int]:
    parts = urlsplit(ground.api)
    return parts.hostname or "", parts.port or 0


async def _get(ground: Ground, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=ground.api, timeout=30) as client:
        return await client.get(path, headers=headers)


async def _post(ground: Ground, path: str, body: bytes, **headers: str) -> httpx.Response:
    own = {"authorization": f"Bearer {ground.api_key}", "content-type": "application/json"}
    async with httpx.AsyncClient(base_url=ground.api, timeout=60) as client:
        return await client.post(path, content=body, headers=own | headers)


async def _must_answer(ground: Ground, why: str) -> None:
    try:
        reply = await _get(ground, "/healthz")
    except httpx.HTTPError as exc:
        raise NotHeld(f"{why}: {exc!r}") from exc
    if reply.status_code != httpx.codes.OK:
        raise NotHeld(f"{why}: {reply.status_code}")


async def unfinished_heads(ground: Ground) -> None:
    """Hold a hundred and thirty connections with half a head."""
    held = []
    for _ in range(130):
        with suppress(OSError):
            connection = socket.create_connection(_place(ground), timeout=2)
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127")
            held.append(connection)
    try:
        await _must_answer(ground, "unfinished heads keep others out")
        await trio.sleep(11)
        held[0].settimeout(3)
        with suppress(ConnectionError):
            if not held[0].recv(100).startswith(b"HTTP/1.1 408"):
                raise NotHeld("an unfinished head may stay")
    except TimeoutError as exc:
        raise NotHeld("an unfinished head may stay") from exc
    finally:
        for connection in held:
            connection.close()


async def http2(ground: Ground) -> None:
    """Speak HTTP/2 without asking."""
    await _must_start(ground, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 505")


async def endless_head(ground: Ground) -> None:
    """Send a head that does not end."""
    await _must_start(ground, b"GET / HTTP/1.1\r\nHost: " + b"a" * 100_000, b"HTTP/1.1 4")


async def _must_start(ground: Ground, data: bytes, start: bytes) -> None:
    def ask() -> bytes:
        with socket.create_connection(_place(ground), timeout=5) as connection:
            connection.settimeout(15)
            with suppress(OSError):
                connection.sendall(data)
                return connection.recv(200)
            return b"closed"

    answer = await trio.to_thread.run_sync(ask)
    if answer not in (b"", b"closed") and not answer.startswith(start):
        raise NotHeld(f"answered {answer[:40]!r}")


async def no_key(ground: Ground) -> None:
    """Ask without a key."""
    for path in ("/v1/models", "/v1/status", "/v1/events", "/metrics"):
        if (await _get(ground, path)).status_code != httpx.codes.UNAUTHORIZED:
            raise NotHeld(f"{path} answers without a key")


async def wrong_key(ground: Ground) -> None:
    """Ask with a key that is not one."""
    reply = await _get(ground, "/v1/models", authorization="Bearer " + "x" * 32)
    if reply.status_code != httpx.codes.UNAUTHORIZED:
        raise NotHeld("a wrong key works")


async def what_others_do(ground: Ground) -> None:
    """Watch other people's sessions with an ordinary key."""
    for path in ("/v1/status", "/v1/events", "/metrics"):
        reply = await _get(ground, path, authorization=f"Bearer {ground.api_key}")
        if reply.status_code != httpx.codes.FORBIDDEN:
            raise NotHeld(f"{path} tells an ordinary key of others")


async def another_name(ground: Ground) -> None:
    """Ask under another site's name (DNS rebinding)."""
    reply = await _get(ground, "/v1/models", host="evil.example", authorization=f"Bearer {ground.api_key}")
    if reply.status_code != httpx.codes.BAD_REQUEST:
        raise NotHeld("it answers for another site")


async def deep_json(ground: Ground) -> None:
    """Send a body that is nested three thousand deep."""
    await _must_be_4xx(ground, b"[" * 3000 + b"]" * 3000)


async def broken_json(ground: Ground) -> None:
    """Send half a body."""
    await _must_be_4xx(ground, b'{"model": "x", "messages": [{"role":')


async def huge_body(ground: Ground) -> None:
    """Send a body of forty megabytes."""
    await _must_be_4xx(ground, b'{"model": "' + b"x" * (40 << 20) + b'"}')


async def huge_answer(ground: Ground) -> None:
    """Ask for a billion tokens."""
    await _must_be_4xx(
        ground, b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1000000000}'
    )


async def exploding_schema(ground: Ground) -> None:
    """Ask for text within a schema that takes gigabytes."""
    bomb = b"(" * 30 + b"a" + b"{0,900})" * 30
    await _must_be_4xx(
        ground,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "'
        + bomb
        + b'"}}',
    )


async def _must_be_4xx(ground: Ground, body: bytes) -> None:
    try:
        reply = await _post(ground, "/v1/chat/completions", body)
    except httpx.HTTPError:
        # The connection was closed on us in the middle of a body that is too large.
        await _must_answer(ground, "it does not answer after a bad body")
        return
    if not httpx.codes.is_client_error(reply.status_code):
        raise NotHeld(f"a bad body is answered {reply.status_code}")


async def two_lengths(ground: Ground) -> None:
    """Smuggle a request behind two contradicting lengths."""
    data = (
        b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    )
    await _must_start(ground, data, b"HTTP/1.1 4")


ATTACKS = (
    unfinished_heads,
    http2,
    endless_head,
    no_key,
    wrong_key,
    what_others_do,
    another_name,
    deep_json,
    broken_json,
    huge_body,
    huge_answer,
    exploding_schema,
    two_lengths,
)
