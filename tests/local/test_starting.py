"""Stages may take long to start, as long as they tell what they do; and they say why they do not start."""

from pathlib import Path

import msgspec
import pytest

from dsd_p2p.errors import ModelError
from dsd_p2p.models.progress import NoProgress
from node.local import local_swarm
from node.local.stage_processes import _ending


class Wanted(msgspec.Struct):
    steps: int
    tells: bool = True
    fails: str = ""


async def start(monkeypatch, wanted):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(local_swarm, "_STILL_TIMEOUT_S", 2.5)
    async with local_swarm.stage_swarm("slow_stage", [wanted], NoProgress()) as started:
        return started[0].address


async def test_the_time_limit_runs_only_while_nothing_moves(monkeypatch):
    """A download of minutes was taken for a machine out of memory."""
    assert await start(monkeypatch, Wanted(steps=12)) == "here"
    with pytest.raises(ModelError, match=r"told nothing for 2\.5 s"):
        await start(monkeypatch, Wanted(steps=12, tells=False))


async def test_a_stage_that_fails_says_why(monkeypatch):
    with pytest.raises(ModelError, match="stage 0: the weights are gone"):
        await start(monkeypatch, Wanted(steps=1, fails="the weights are gone"))


def test_an_ending_is_told_in_words():
    assert "killed: the system does that when memory runs out" in _ending(-9)
    assert _ending(-15) == "the process was ended by SIGTERM"
    assert "code 3" in _ending(3)
