"""The dashboard: what it shows at three sizes, what it survives, what it costs, and its keys."""

import gzip
import io
import json
import os
import pty
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from dsd_p2p.telemetry.events import (
    PeerStatus,
    Replayed,
    SessionEnded,
    SessionStarted,
    StageOf,
    WindowVerified,
    encode_event,
    read_events,
)
from dsd_p2p.telemetry.picture import Picture
from node.watch.dashboard.screen import press
from node.watch.dashboard.view import Choices, Sort, render, sparkline

SNAPSHOTS = Path(__file__).parent / "snapshots"
CHAIN = (
    StageOf(peer="stage-a", first=0, last=10),
    StageOf(peer="stage-b", first=10, last=20),
    StageOf(peer="stage-c", first=20, last=30),
)


def story() -> list[object]:
    """Half a minute of a small swarm: three requests, a replay, a peer that vanishes."""
    events: list[object] = []
    for second in range(30):
        at_s = 1000.0 + second
        for number, stage in enumerate(CHAIN):
            if stage.peer == "stage-c" and second > 20:
                continue
            events.append(
                PeerStatus(
                    at_s=at_s,
                    peer=stage.peer,
                    roles=("stage",),
                    version="0.1.0",
                    model="smollm2-135m",
                    dtype="float32",
                    first=stage.first,
                    last=stage.last,
                    num_layers=30,
                    state="serving",
                    num_sessions=2,
                    queue=number,
                    busy_share=0.3 * (number + 1),
                    cache_bytes=(number + 1) << 26,
                    max_cache_bytes=1 << 30,
                    num_passes=10 * second,
                    num_windows=14 * second,
                    links_s={"stage-b": 0.021, "hub": 0.05},
                )
            )
        events.append(
            PeerStatus(
                at_s=at_s, peer="hub", roles=("coordinator", "gateway"), version="0.1.0", links_s={"stage-a": 0.042}
            )
        )
        for number in range(3):
            session = f"session{number}"
            if second == number:
                events.append(
                    SessionStarted(
                        at_s=at_s,
                        session=session,
                        coordinator="hub",
                        stages=CHAIN,
                        max_tokens=200,
                        drafter="shadow+ngram",
                    )
                )
            if second > number:
                events.append(
                    WindowVerified(
                        at_s=at_s,
                        session=session,
                        coordinator="hub",
                        mode="continuous",
                        decision="continuous 4x2, 6 in flight",
                        reason="11.2 tokens/s expected, plain 4.0",
                        num_tokens=4 * (second - number),
                        num_windows=6 * second,
                        num_nodes=30 * second,
                        num_misses=second // 3,
                        num_stale=10 * second,
                        num_in_flight=3,
                        traversal_s=0.21,
                        stage_us=(9000, 11000, 14000),
                        hits_by_depth=(8 * second, 6 * second, 3 * second),
                        outcomes_by_depth=(10 * second, 9 * second, 5 * second),
                    )
                )
    events.append(Replayed(at_s=1029.2, session="session1", coordinator="hub", stages=CHAIN[:2], num_tokens=100))
    events.append(
        SessionEnded(
            at_s=1029.5, session="session2", coordinator="hub", reason="error", error="no route is left", num_tokens=100
        )
    )
    return events


def picture_of(events) -> Picture:
    picture = Picture()
    for event in events:
        picture.add(event)
    picture.tick(1030.0)
    return picture


def screen(picture: Picture, width: int, height: int, choices: Choices | None = None, colour: bool = False) -> str:
    console = Console(
        width=width,
        height=height,
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
    )
    with console.capture() as capture:
        console.print(render(picture, choices or Choices(source="test"), width, height))
    return capture.get()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60)])
def test_what_is_shown_is_what_was_agreed(width, height):
    shown = screen(picture_of(story()), width, height)
    lines = shown.splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    # Alerts first.
    assert lines[1].startswith("!!")
    file = SNAPSHOTS / f"dashboard-{width}x{height}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown)
    assert shown == file.read_text()


def test_colour_adds_nothing_that_words_do_not_say():
    import re

    picture = picture_of(story())
    assert re.sub(r"\x1b\[[0-9;]*m", "", screen(picture, 80, 24, colour=True)) == screen(picture, 80, 24)


@pytest.mark.parametrize("index", range(7))
def test_one_can_look_closer_at_everything(index):
    picture = picture_of(story())
    shown = screen(picture, 80, 24, Choices(cursor=index, is_drilled=True))
    assert ("layers" in shown) or ("traversal" in shown)
    # What was looked at may be gone the next moment.
    picture.peers.clear()
    picture.sessions.clear()
    assert screen(picture, 80, 24, Choices(cursor=index, is_drilled=True))


def test_keys():
    choices = Choices()
    assert press("space", choices)
    assert choices.is_paused
    assert press("s", choices)
    assert choices.sort is Sort.BUSY
    for key in ("down", "down", "up", "enter", "x", ""):
        assert press(key, choices)
    assert (choices.cursor, choices.is_drilled) == (1, True)
    press("escape", choices)
    assert not choices.is_drilled
    assert not press("q", choices)


def test_nothing_is_needed_and_nothing_is_too_much():
    assert screen(Picture(), 80, 24)
    rng = random.Random(1)
    picture = Picture()
    for number in range(200):
        picture.add(PeerStatus(at_s=5.0, peer=f"peer{number}" * 3, last=rng.randrange(30), busy_share=rng.random()))
        picture.add(WindowVerified(at_s=5.0, session=f"s{number}", coordinator="c", reason="x" * 900))
    for width, height in ((80, 24), (40, 10), (200, 60)):
        lines = screen(picture, width, height).splitlines()
        assert all(len(line) <= width for line in lines)
        assert len(lines) <= height + 4
    assert sparkline([], 10) == ""
    assert sparkline([0, 1, 2, 4], 3) == "▃▅█"


def test_what_peers_say_does_not_steer_the_terminal():
    picture = Picture()
    picture.add(
        PeerStatus(at_s=5.0, peer="p\x1b[2J", state="[/x] [red]", version="\x1b]0;owned\x07", roles=("[b]",), last=3)
    )
    picture.add(WindowVerified(at_s=5.0, session="[/]\x1b", coordinator="c", decision="[/x]", reason="\x1b[31m[/]"))
    for choices in (Choices(), Choices(is_drilled=True), Choices(is_drilled=True, cursor=1)):
        for width, height in ((80, 24), (200, 60)):
            shown = screen(picture, width, height, choices)
            assert "\x1b" not in shown
            assert "\x07" not in shown


def test_two_hundred_peers_at_ten_updates_a_second_cost_less_than_two_fifths_of_a_core():
    """Counted in processor time of this process, four frames a second as on a screen."""
    picture, choices = Picture(), Choices()
    events = [
        PeerStatus(at_s=1000.0, peer=f"12D3KooW{number:044d}", first=number % 30, last=number % 30 + 1, busy_share=0.5)
        for number in range(200)
    ]
    lines = [encode_event(event) for event in events]
    from dsd_p2p.telemetry.events import decode_event

    seconds = 3
    before = time.process_time()
    for frame in range(4 * seconds):
        for _ in range(10 * 200 // 4 // 200):
            for line in lines:
                picture.add(decode_event(line))
        for line in lines[: 10 * 200 // 4 % 200]:
            picture.add(decode_event(line))
        picture.tick(1000.0 + frame / 4)
        screen(picture, 200, 60, choices)
    assert (time.process_time() - before) / seconds < 0.4


def write(file: Path, events) -> Path:
    file.write_bytes(b"".join(encode_event(event) + b"\n" for event in events))
    return file


def dsd(*words: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "node.cli", *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_a_recording_is_replayed_whatever_is_in_it(tmp_path):
    file = write(tmp_path / "run.jsonl", story())
    with file.open("ab") as more:
        more.write(b"garbage\n{}\n" + os.urandom(200) + b'\n{"schema":7,"event":{"type":"peer"}}\n')
    done = dsd("top", "--replay", str(file), "--once", "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["totals"]["sessions"] == 3
    assert {peer["peer"] for peer in seen["peers"]} == {"hub", "stage-a", "stage-b", "stage-c"}
    assert dsd("top", "--replay", str(file), "--once").stdout.startswith("dsd ")
    picture = tmp_path / "top.svg"
    assert dsd("top", "--replay", str(file), "--svg", str(picture)).returncode == 0
    assert "<svg" in picture.read_text()


def test_without_a_terminal_that_can_redraw_it_is_one_picture(tmp_path):
    file = write(tmp_path / "run.jsonl", story())
    for variables in ({}, {"TERM": "dumb"}):
        done = dsd("top", "--replay", str(file), env=os.environ | variables, stdin=subprocess.DEVNULL)
        assert done.returncode == 0
        assert done.stderr == "dsd top: no terminal that can redraw, so this is one picture\n"
        assert done.stdout.startswith("dsd ")


def test_what_cannot_be_watched_is_named(tmp_path):
    for words, text in (
        (("--replay", str(tmp_path / "nothing")), "recording"),
        (("--replay", str(write(tmp_path / "empty", []))), "no dsd events"),
        (("ftp://x",), "name a gateway"),
        (("http://127.0.0.1:1", "--once", "--seconds", "0.5"), "trying again"),
    ):
        done = dsd("top", *words)
        assert done.returncode == 2, done.stdout
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_on_a_terminal_it_draws_takes_keys_and_leaves_it_as_it_was(tmp_path):
    file = write(tmp_path / "run.jsonl", story())
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "node.cli", "top", "--replay", str(file), "--speed", "20"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):
            while data := os.read(master, 65536):
                shown.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 30
        while b"requests" not in shown:
            assert time.monotonic() < deadline, bytes(shown)
            time.sleep(0.05)
        for key in (b" ", b" ", b"s", b"\x1b[B", b"\r", b"\x1b", b"q"):
            os.write(master, key)
            time.sleep(0.3)
        assert process.wait(20) == 0, process.stderr.read()
        reader.join(5)
        # The screen before is back, and the cursor.
        assert b"\x1b[?1049l" in shown
        assert b"\x1b[?25h" in shown
    finally:
        process.kill()
        process.wait(5)
        os.close(master)
        process.stderr.close()


def test_a_recorded_chaos_run_is_shown_from_its_first_event_to_its_last():
    """Of `scripts/testnet chaos --minutes 1.2 --nodes 5 --clients 2 --seed 3`: peers frozen, cut off, leaving, coming back."""
    lines = gzip.decompress((Path(__file__).parent / "data/chaos.jsonl.gz").read_bytes()).splitlines()
    picture, choices = Picture(), Choices(source="chaos")
    for number, event in enumerate(read_events(lines)):
        picture.add(event)
        if number % 25 == 0:
            picture.tick(picture.now_s)
            choices.cursor, choices.is_drilled = number // 25 % 9, number // 25 % 2 == 1
            for width, height in ((80, 24), (200, 60)):
                assert screen(picture, width, height, choices)
    assert len(picture.peers) == 5
    assert picture.totals["replays"] == 14
    assert picture.totals["num_tokens"] >= 384
