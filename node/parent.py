"""Ends this process when the one that started it is gone."""

import os
import threading


def watch_parent() -> None:
    """Exit when standard input ends: only the parent holds the other end of that pipe, however the parent dies."""
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)
