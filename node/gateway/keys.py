"""Checks clients' API keys and limits how much each may use in a minute."""

import hashlib
import hmac
import math
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError
from node.gateway.errors import ApiError

_ANYBODY = "anybody"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the key file.

    key or sha256: the secret, or its hex digest. A limit of 0 means no limit. watch: may see what other keys do.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    key: Annotated[str, Meta(min_length=16, max_length=256)] | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    requests_per_minute: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    watch: bool = False

    @property
    def digest(self) -> str:
        """The hex digest of the secret."""
        return self.sha256 or hashlib.sha256((self.key or "").encode()).hexdigest()


class _KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: list[ApiKey]


def read_keys(file: Path) -> list[ApiKey]:
    """Return the keys of a TOML file that has a `[[key]]` table for each.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong.
    """
    try:
        keys = msgspec.convert(tomllib.loads(file.read_text()), _KeysFile).key
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigError(f"API keys {file}: {exc}") from exc
    if not keys:
        raise ConfigError(f"API keys {file}: expected at least one [[key]] table, found none: add one")
    for key in keys:
        if (key.key is None) == (key.sha256 is None):
            raise ConfigError(f"API keys {file}: {key.name!r} needs exactly one of key and sha256")
    if len({key.name for key in keys}) != len(keys):
        raise ConfigError(f"API keys {file}: two keys have the same name: give each its own")
    return keys


@dataclass(slots=True)
class Bucket:
    """A token bucket: `limit` a minute, and as many at once.

    limit: 0 means no limit. A level below zero is a debt.
    """

    limit: int
    level: float = field(init=False)
    at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at_s = float(self.limit), time.monotonic()

    def fill(self) -> None:
        """Add what has accrued since the last call."""
        now_s = time.monotonic()
        self.level = min(float(self.limit), self.level + (now_s - self.at_s) * self.limit / 60)
        self.at_s = now_s

    def wait_s(self, amount: float) -> float:
        """Return the seconds until `amount` is available. An amount above the limit waits for a full bucket."""
        if not self.limit:
            return 0.0
        return max(0.0, (min(amount, self.limit) - self.level) * 60 / self.limit)


class Client:
    """A client and what is left of its limits."""

    def __init__(
        self, name: str, requests_per_minute: int = 0, tokens_per_minute: int = 0, *, may_watch: bool = False
    ) -> None:
        self.name = name
        self._may_watch = may_watch
        self._requests = Bucket(requests_per_minute)
        self._tokens = Bucket(tokens_per_minute)

    def begin(self) -> None:
        """Count a request before anything is done for it, whether or not it succeeds.

        Raises:
            ApiError: 429, with the time to wait.
        """
        self._spend(self._requests, 1, "requests")

    def check_watch(self) -> None:
        """Check that the client may see everybody's sessions.

        Raises:
            ApiError: 403.
        """
        if not self._may_watch:
            raise ApiError(
                403,
                f"{self.name} may not see what others do here: set watch = true for this key in the file of --api-keys",
                code="not_allowed",
            )

    def take(self, num_tokens: int) -> None:
        """Count the tokens of a request's prompts. Raises the same error as `begin`."""
        self._spend(self._tokens, num_tokens, "tokens")

    def _spend(self, bucket: Bucket, amount: int, what: str) -> None:
        bucket.fill()
        if (wait_s := bucket.wait_s(amount)) > 0:
            raise ApiError(
                429,
                f"{self.name} may use {bucket.limit} {what} a minute: try again in {math.ceil(wait_s)} s",
                kind=what,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(wait_s)), **self.headers()},
            )
        bucket.level -= amount

    def spend(self, num_tokens: int) -> None:
        """Count the tokens of an answer."""
        self._tokens.level -= num_tokens

    def headers(self) -> dict[str, str]:
        """Return OpenAI's rate limit headers."""
        headers = {}
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket.limit:
                bucket.fill()
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                headers[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.limit):.3f}s"
        return headers


class Clients:
    """The clients of the gateway. Without keys everybody may ask."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self._by_digest = {
            key.digest: Client(key.name, key.requests_per_minute, key.tokens_per_minute, may_watch=key.watch)
            for key in keys
        }
        self._anybody = Client(_ANYBODY, may_watch=True)

    @property
    def need_keys(self) -> bool:
        """True when a request without a key is refused."""
        return bool(self._by_digest)

    def identify(self, headers: Mapping[str, str]) -> Client:
        """Return the client that sent a request.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if not self.need_keys:
            return self._anybody
        # Anthropic's clients send their keys in a header of their own.
        given = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"
        scheme, _, secret = given.partition(" ")
        digest = hashlib.sha256(secret.strip().encode()).hexdigest()
        known = next((client for known, client in self._by_digest.items() if hmac.compare_digest(known, digest)), None)
        if scheme.lower() != "bearer" or known is None:
            raise ApiError(
                401,
                "send the key that this gateway's operator gave you as 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return known
