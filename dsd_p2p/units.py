"""Parses quantities as people write them: `50ms`, `100mbit`, `2GB`, `0:10`."""

import re

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import Span

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BITS_PER_SECOND = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BYTES = {"b": 1.0, "kb": 2.0**10, "mb": 2.0**20, "gb": 2.0**30}


def seconds(text: str) -> float:
    """Return a duration like `50ms`, `0.5s`, `24h` or `30d` in seconds."""
    return _quantity(text, _SECONDS, "50ms")


def bits_per_second(text: str) -> float:
    """Return a bandwidth like `100mbit` in bits per second."""
    return _quantity(text, _BITS_PER_SECOND, "100mbit")


def num_bytes(text: str) -> int:
    """Return a size like `2GB` in bytes (powers of 1024)."""
    return int(_quantity(text, _BYTES, "2GB"))


def duration(seconds: float) -> str:
    """Return seconds as a person would say them, in one unit: "3 h"."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def span(text: str) -> Span:
    """Return `0:10` as the half-open span [0, 10)."""
    first, separator, last = text.partition(":")
    if not separator or not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise ConfigError(f"span {text!r}: expected FIRST:LAST with FIRST below LAST, like 0:10")
    return Span(int(first), int(last))


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2].lower() not in units and float(match[1]) != 0):
        raise ConfigError(f"{text!r}: expected a number and one of {', '.join(units)}, like {example}")
    return float(match[1]) * units.get(match[2].lower(), 1.0)
