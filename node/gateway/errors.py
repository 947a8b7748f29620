"""Reports errors in the form that OpenAI's clients expect."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from dsd_p2p.errors import CapacityError, ConfigError, DsdError, ModelError, PeerTimeout


class ApiError(Exception):
    """An error that answers a request.

    status: the HTTP status. kind, code, param: OpenAI's `type`, `code` and `param`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the error as the whole HTTP response."""
        return json_response(self.body, self.status, self.headers)


def unexpected() -> ApiError:
    """Return the answer to an unexpected failure. The caller logs the failure."""
    return ApiError(500, "the gateway failed; see its log", kind="server_error")


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `body` as JSON."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def api_error(error: DsdError) -> ApiError:
    """Return the answer that reports one of our errors."""
    match error:
        case CapacityError():
            return ApiError(429, str(error), kind="rate_limit_error", code="overloaded", headers={"Retry-After": "5"})
        case ConfigError():
            return ApiError(400, str(error), code="invalid_request")
        case PeerTimeout():
            return ApiError(504, str(error), kind="server_error", code="swarm_timeout")
        case ModelError():
            return ApiError(500, str(error), kind="server_error", code="model_error")
        case _:
            return ApiError(
                503, str(error), kind="server_error", code="swarm_unavailable", headers={"Retry-After": "5"}
            )
