"""Streams the swarm's events as server-sent events: first those that make up the present picture, then new ones."""

import trio
from starlette.types import Receive, Scope, Send

from dsd_p2p.telemetry.events import encode_event
from node.gateway.errors import ApiError
from node.gateway.writing import watch_disconnect
from node.watch.hub import EventHub

_BEAT_S = 5.0


class EventStream:
    """A Starlette response that ends when the listener disconnects."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response over ASGI."""
        async with self._hub.listen() as listening:
            if listening is None:
                error = ApiError(
                    429,
                    "too many clients listen to the events already: try again later",
                    kind="rate_limit_error",
                    code="overloaded",
                )
                await error.response()(scope, receive, send)
                return
            first, events = listening
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_disconnect, receive, nursery.cancel_scope)
                await _send(send, b"".join(b"data: " + encode_event(event) + b"\n\n" for event in first) or b":\n\n")
                while True:
                    body = b":\n\n"
                    with trio.move_on_after(_BEAT_S):
                        body = b"data: " + encode_event(await events.receive()) + b"\n\n"
                    await _send(send, body)


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
