"""Implements `dsd top`: show a dashboard of a swarm."""

import os
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.mqtt import parse_broker
from dsd_p2p.telemetry.picture import Picture
from dsd_p2p.telemetry.summary import describe
from node.config import TopConfig
from node.watch.dashboard.screen import follow, show
from node.watch.dashboard.sources import BrokerSource, GatewaySource, Recorder, Replay, Source
from node.watch.dashboard.view import Choices, render

_ONCE_S = 2.5
"""Long enough to hear every peer: each sends its status every second."""


def run(config: TopConfig) -> int:
    """Show the dashboard until the user quits. With --once or --svg, take one picture."""
    source = _source(config)
    if config.record:
        source = Recorder(source, Path(config.record))
    try:
        if not config.once and not config.svg:
            if _is_live(console := Console()):
                show(source, console)
                return 0
            print("dsd top: no terminal that can redraw, so this is one picture", file=sys.stderr)
        picture = _look_once(source, config)
        if config.json:
            print(msgspec.json.encode(describe(picture)).decode())
        if config.svg:
            _draw(picture, source, config)
        elif not config.json:
            console = Console()
            console.print(render(picture, Choices(source=source.name), console.width, console.height))
    finally:
        source.close()
    return 0


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _source(config: TopConfig) -> Source:
    if config.replay:
        return Replay(Path(config.replay), config.speed)
    if config.target.startswith(("mqtt://", "mqtts://")):
        return BrokerSource(parse_broker(config.target, swarm=config.topics, ca_file=config.mqtt_ca))
    if not config.target.startswith(("http://", "https://")):
        raise ConfigError(f"{config.target!r}: name a gateway, http://HOST:PORT, or a broker, mqtt://HOST:PORT")
    return GatewaySource(config.target, config.key or os.environ.get("OPENAI_API_KEY", ""))


def _look_once(source: Source, config: TopConfig) -> Picture:
    """Return a picture of the events of a few seconds, or of a whole recording."""
    picture = Picture()
    until_s = time.monotonic() + (config.seconds or _ONCE_S)
    if isinstance(source, Replay):
        source = Replay(Path(config.replay), 1e12)
    while not source.is_over and (isinstance(source, Replay) or time.monotonic() < until_s):
        for event in source.take():
            picture.add(event)
        time.sleep(0 if isinstance(source, Replay) else 0.05)
    if not isinstance(source, Replay):
        follow(source, picture)
        if source.trouble and not picture.num_events:
            raise ConfigError(f"{source.name}: {source.trouble}")
    return picture


def _draw(picture: Picture, source: Source, config: TopConfig) -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=config.columns, height=config.rows, force_terminal=True, file=nowhere)
        console.print(render(picture, Choices(source=source.name), config.columns, config.rows))
        console.save_svg(config.svg, title="dsd top")
