"""Reads and checks the body of a request."""

from typing import TypeVar

import msgspec
import trio
from starlette.requests import Request

from node.gateway.errors import ApiError
from node.gateway.schema import ForModel, unknown_fields

Asked = TypeVar("Asked", bound=ForModel)

_TIMEOUT_S = 60.0
_MAX_NAME = 64


async def read_body(request: Request, kind: type[Asked], *, max_bytes: int, is_strict: bool) -> tuple[Asked, list[str]]:
    """Return what is asked, and the names of fields that are ignored because we do not know them.

    A web page of another site cannot post JSON here without a preflight request, and the gateway does not answer
    those.

    Raises:
        ApiError: the body is not what the endpoint takes; if `is_strict`, also for an unknown field.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request as application/json")
    body = bytearray()
    try:
        with trio.fail_after(_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError(413, f"the request is longer than {max_bytes} bytes")
    except trio.TooSlowError:
        raise ApiError(408, f"the request did not arrive within {_TIMEOUT_S:g} s") from None
    try:
        asked = msgspec.json.decode(body, type=kind)
        ignored = [as_header(name) for name in unknown_fields(body, kind)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        text = str(exc)
        param = text.partition("`$.")[2].partition("`")[0] or None
        raise ApiError(400, text, code="invalid_request", param=param) from exc
    if ignored and is_strict:
        raise ApiError(400, f"{ignored[0]}: there is no such field, and the gateway is --strict", param=ignored[0])
    return asked, ignored


def as_header(name: str) -> str:
    """Return a client's word as a header can carry it."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in name[:_MAX_NAME])
