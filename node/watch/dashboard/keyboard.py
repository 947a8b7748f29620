"""Reads single keys from a terminal without waiting for Enter."""

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {b"\x1b[A": "up", b"\x1b[B": "down", b"\r": "enter", b"\n": "enter", b"\x1b": "escape", b" ": "space"}


@contextmanager
def raw_keys() -> Iterator[bool]:
    """Deliver keys one by one until the end of the block. Yields False if standard input is no terminal."""
    if not sys.stdin.isatty():
        yield False
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield True
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def next_key(timeout_s: float) -> str:
    """Return the key pressed within `timeout_s`, as a letter or a name; empty if there was none."""
    if not select.select([sys.stdin], [], [], timeout_s)[0]:
        return ""
    data = os.read(sys.stdin.fileno(), 8)
    return _NAMES.get(data, data[:1].decode("latin-1"))
