"""Runs the stages of the fake ring, each in its own process.

Run as `python -m node.lab.fake_stages`, with a list of `FakeStage` on standard input.
"""

import sys
from collections.abc import Callable
from functools import partial

import msgspec

from node.lab.recorded import FakeStage, load_recorded
from node.local.events import StageEvent
from node.local.stage_node import serve
from node.local.stage_processes import fork_each


def main() -> None:
    """Fork one fake stage for each entry."""
    stages = msgspec.json.decode(sys.stdin.readline(), type=list[FakeStage])
    fork_each([partial(_serve, stage) for stage in stages])


def _serve(stage: FakeStage, tell: Callable[[StageEvent], None]) -> int:
    return serve(stage.config, tell, partial(load_recorded, stage))


if __name__ == "__main__":
    main()
