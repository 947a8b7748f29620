"""Ends this process when its parent process ends."""

import os
import threading


def watch_parent() -> None:
    """Exit when standard input ends. Only the parent holds the pipe's other end, so this works however it dies."""
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)
