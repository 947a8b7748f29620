"""Draws or reads when requests arrive and how long they are."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.sim.scenario import Length, Workload


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. arrived_s: seconds since the start."""

    arrived_s: float
    num_prompt_tokens: int
    num_answer_tokens: int


class _TraceLine(msgspec.Struct):
    arrival_s: float
    prompt_tokens: int
    answer_tokens: int


def lengths(length: Length, rng: random.Random) -> int:
    """Draw one length in tokens."""
    if length.variation == 0:
        return min(round(length.mean), length.most)
    sigma2 = math.log(1 + length.variation**2)
    value = rng.lognormvariate(math.log(length.mean) - sigma2 / 2, math.sqrt(sigma2))
    return max(1, min(round(value), length.most))


def arrivals(workload: Workload, rng: random.Random) -> Iterator[Arrival]:
    """Yield the arrivals in order: `workload.requests` of them, or fewer if `workload.file` ends before.

    In a closed loop all arrive at 0, and the caller decides when each request starts.

    Raises:
        ConfigError: `workload.file` cannot be read, or a line of it is wrong.
    """
    if workload.arrivals == "trace":
        yield from _traced(workload)
        return
    now_s = 0.0
    shape = 1 / workload.burstiness**2
    for _ in range(workload.requests):
        match workload.arrivals:
            case "poisson":
                now_s += rng.expovariate(workload.rate)
            case "gamma":
                now_s += rng.gammavariate(shape, 1 / (shape * workload.rate))
            case _:
                pass
        yield Arrival(now_s, lengths(workload.prompt, rng), lengths(workload.answer, rng))


def _traced(workload: Workload) -> Iterator[Arrival]:
    path = Path(workload.file)
    last_s = 0.0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number > workload.requests:
                    return
                each = msgspec.json.decode(line, type=_TraceLine)
                is_sane = each.arrival_s >= last_s and min(each.prompt_tokens, each.answer_tokens) >= 1
                if not is_sane:
                    raise ConfigError(
                        f"{path}:{number}: arrival_s must not decrease, prompt_tokens and answer_tokens must be 1 or more"
                    )
                last_s = each.arrival_s
                yield Arrival(each.arrival_s, each.prompt_tokens, each.answer_tokens)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(
            f"workload file {path}: {exc}; expected one JSON object a line with arrival_s, prompt_tokens, answer_tokens"
        ) from exc
