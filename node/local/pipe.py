"""Events of forked processes on one shared pipe: one JSON object a line, each written in one piece."""

import os
from typing import Generic, TypeVar

import msgspec

Event = TypeVar("Event", bound=msgspec.Struct)


class Report(msgspec.Struct, Generic[Event]):
    """An event and the number of the process it is about."""

    index: int
    event: Event


def report(index: int, event: msgspec.Struct) -> None:
    """Write the event to standard output."""
    os.write(1, msgspec.json.encode(Report(index=index, event=event)) + b"\n")
