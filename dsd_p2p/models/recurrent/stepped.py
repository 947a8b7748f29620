"""Runs Mamba 1's recurrence over a tree of nodes, one depth after the other.

Each channel has a decay of its own for each number of its state, so the attention form (`.linear`) would cost more than
the states themselves. The states of one depth exist only until the next: those of waiting slots are computed again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dsd_p2p.models.recurrent.memory import LayerMemory
from dsd_p2p.models.recurrent.paths import Paths

_ROWS = ("x", "dt", "b")


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedTerms:
    """What the recurrence reads of each new node, float32.

    x, dt: `[n, channels]`. b, c: `[n, numbers]`. a: `[channels, numbers]`, the same for all nodes.
    """

    x: torch.Tensor
    dt: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    a: torch.Tensor

    def part(self, start: int, end: int) -> "SteppedTerms":
        """Return the terms of nodes `[start, end)`."""
        return SteppedTerms(
            x=self.x[start:end], dt=self.dt[start:end], b=self.b[start:end], c=self.c[start:end], a=self.a
        )


def scan_stepped(memory: LayerMemory, paths: Paths, new: SteppedTerms) -> torch.Tensor:
    """Return what the new nodes of one session read, float32 `[n, channels]`, and store what their states need."""
    num_old, a = paths.num_old, new.a
    rows = {name: memory.write(name, getattr(new, name), num_old) for name in _ROWS}
    states = memory.start_state(new.x, tuple(a.shape))[None]
    memory.fold = lambda state, rows: _folded(state, rows, a)
    outputs = torch.empty_like(new.x)
    for slots, parents in paths.levels:
        states = _after(states[parents], {name: each[slots] for name, each in rows.items()}, a)
        own = [index for index, slot in enumerate(slots) if slot >= num_old]
        nodes = [slots[index] - num_old for index in own]
        outputs[nodes] = (states[own] @ new.c[nodes][..., None])[..., 0]
    return outputs


def _after(states: torch.Tensor, rows: Mapping[str, torch.Tensor], a: torch.Tensor) -> torch.Tensor:
    """Return the states `[m, channels, numbers]` after one row each."""
    dt = rows["dt"][..., None]
    return (dt * a).exp_() * states + (dt * rows["b"][:, None]) * rows["x"][..., None]


def _folded(state: torch.Tensor, rows: Mapping[str, torch.Tensor], a: torch.Tensor) -> torch.Tensor:
    for slot in range(len(rows["dt"])):
        state = _after(state[None], {name: rows[name][slot : slot + 1] for name in _ROWS}, a)[0]
    return state
