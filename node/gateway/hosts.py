"""Refuses requests that call the gateway by a name that is not its own.

Otherwise a web page could point its own name here and read the answers (DNS rebinding).
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from node.gateway.errors import ApiError


class OnlyHosts:
    """ASGI middleware. hosts: the names to accept, without a port; `*` accepts every name."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with an error."""
        if scope["type"] == "http" and "*" not in self._hosts:
            host = Headers(scope=scope).get("host", "")
            name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
            if name.lower() not in self._hosts:
                error = ApiError(400, f"this gateway is not called {name!r}: start it with --names {name or 'NAME'}")
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
