"""Runs the dashboard's loop: take events, draw, handle keys."""

import time

from rich.console import Console
from rich.live import Live

from dsd_p2p.telemetry.picture import Picture
from node.watch.dashboard.keyboard import next_key, raw_keys
from node.watch.dashboard.sources import Source
from node.watch.dashboard.view import Choices, Sort, render

_FRAME_S = 0.25
_HOLD_S = 2.0


def show(source: Source, console: Console) -> Picture:
    """Draw until the user quits or a recording ends, and return the last picture."""
    picture, choices = Picture(), Choices(source=source.name)
    over_s: float | None = None
    with raw_keys() as has_keys, Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while over_s is None or time.monotonic() - over_s < _HOLD_S:
            if not choices.is_paused:
                follow(source, picture)
            choices.trouble = source.trouble
            live.update(render(picture, choices, console.width, console.height), refresh=True)
            key = next_key(_FRAME_S) if has_keys else ""
            if not has_keys:
                time.sleep(_FRAME_S)
            if not press(key, choices):
                break
            if source.is_over and over_s is None:
                over_s = time.monotonic()
    return picture


def follow(source: Source, picture: Picture) -> None:
    """Add the source's new events to the picture."""
    for event in source.take():
        picture.add(event)
    picture.tick(source.now_s())


def press(key: str, choices: Choices) -> bool:
    """Handle a key. Returns False to quit."""
    match key:
        case "q":
            return False
        case "space":
            choices.is_paused = not choices.is_paused
        case "s":
            order = list(Sort)
            choices.sort = order[(order.index(choices.sort) + 1) % len(order)]
        case "down" | "j":
            choices.cursor += 1
        case "up" | "k":
            choices.cursor = max(0, choices.cursor - 1)
        case "enter":
            choices.is_drilled = True
        case "escape":
            choices.is_drilled = False
        case _:
            pass
    return True
