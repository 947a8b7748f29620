"""Writes events of forked processes to one shared pipe: one JSON object per line, each in a single write."""

import os
from typing import Generic, TypeVar

import msgspec

Event = TypeVar("Event", bound=msgspec.Struct)


class Report(msgspec.Struct, Generic[Event]):
    """An event and the index of the process that it is about."""

    index: int
    event: Event


def report(index: int, event: msgspec.Struct) -> None:
    """Write the event to standard output."""
    os.write(1, msgspec.json.encode(Report(index=index, event=event)) + b"\n")
