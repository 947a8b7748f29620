"""Carries attacks out, one after the other, and prints for each a JSON line that says whether it held.

Run as `python -m node.lab.testnet.attacks FIRST STEP`, with a `Ground` as JSON on standard input. It carries out every
STEP-th attack from number FIRST on.
"""

import logging
import sys
from collections.abc import Awaitable, Callable

import msgspec
import trio

from dsd_p2p.errors import DsdError, first_cause
from node.lab.testnet.attacks import doors, members, sessions, strangers
from node.lab.testnet.attacks.ground import Ground, NotHeld

ALL: tuple[Callable[[Ground], Awaitable[None]], ...] = (
    *strangers.ATTACKS,
    *members.ATTACKS,
    *sessions.ATTACKS,
    *doors.ATTACKS,
)

_TIME_S = 120.0


class Result(msgspec.Struct, kw_only=True):
    """The outcome of one attack. why: how it succeeded, or empty."""

    name: str
    held: bool
    seconds: float
    why: str = ""


async def carry_out(ground: Ground, attack: Callable[[Ground], Awaitable[None]]) -> Result:
    """Carry one attack out."""
    name = f"{attack.__module__.rpartition('.')[2]}: {attack.__name__.replace('_', ' ')}"
    why, start_s = "", trio.current_time()
    try:
        with trio.fail_after(_TIME_S):
            await attack(ground)
    except (NotHeld, DsdError, OSError, trio.TooSlowError, BaseExceptionGroup) as exc:
        why = repr(first_cause(exc))[:300]
    return Result(name=name, held=not why, seconds=round(trio.current_time() - start_s, 1), why=why)


async def _main(ground: Ground, first: int, step: int) -> None:
    for attack in ALL[first::step]:
        print(msgspec.json.encode(await carry_out(ground, attack)).decode(), flush=True)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    trio.run(_main, msgspec.json.decode(sys.stdin.buffer.read(), type=Ground), int(sys.argv[1]), int(sys.argv[2]))
