"""Runs a linear recurrence over a tree of nodes as attention without softmax over the waiting slots.

How it works. Each head has a state S, `[dk, dv]`. Node i decays its parent's state by a_i = exp(g_i), writes a row u_i
under its key k_i, and reads with its query q_i:

    S_i = a_i S_parent + k_i u_iᵀ        o_i = q_i S_i
    Mamba 2:     u_i = dt_i x_i
    delta rule:  u_i = β_i (v_i - k_i a_i S_parent)

Unrolled to the state S_0 of the folded text, no state of a node is left. With D_ij the decay along the path from j
(excluded) to i, and D_i0 the one from the folded text:

    o_i = q_i D_i0 S_0 + Σ_j D_ij (q_i · k_j) u_j      j on the path of i, itself included
    u_i = β_i (v_i - k_i D_i0 S_0 - Σ_j D_ij (k_i · k_j) u_j)      j before i on its path

The second is one triangular system for all new nodes. What a node wrote does not depend on which positions are folded,
so k, g and u are the rows that a slot keeps, and S_0 takes them in when the text has gone past them:

    S_0 ← D_n0 S_0 + Σ_j D_nj k_j u_jᵀ

The decays along a path are summed from the node's end, so nothing large cancels. Source: the chunked forms of gated
delta rule (arXiv 2412.06464) and Mamba 2 (arXiv 2405.21060); a tree takes the place of their triangle.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsd_p2p.models.recurrent.memory import LayerMemory
from dsd_p2p.models.recurrent.paths import Paths

_MOST_ROWS = 32
"""New nodes that are computed at once, and folded for a moment if all later ones descend from them."""

_MOST_DECAYS = 1 << 22
"""Numbers of the decays between new nodes and slots that are computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTerms:
    """What the recurrence reads of each new node, all sessions' in one.

    query: `[n, heads, dk]`. key: `[n, groups, dk]`, as it is stored; heads share a group's. value: `[n, heads, dv]`.
    decay: logarithms, `[n, heads]` or `[n, heads, dk]`. beta: `[n, heads]` of a delta rule, else None. All but the key
    are float32. widen: makes float32 `[n, heads, dk]` of stored keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor | None
    widen: Callable[[torch.Tensor], torch.Tensor]

    def part(self, start: int, end: int) -> "LinearTerms":
        """Return the terms of nodes `[start, end)`."""
        return LinearTerms(
            query=self.query[start:end],
            key=self.key[start:end],
            value=self.value[start:end],
            decay=self.decay[start:end],
            beta=None if self.beta is None else self.beta[start:end],
            widen=self.widen,
        )


def scan_linear(memory: LayerMemory, paths: Paths, new: LinearTerms) -> torch.Tensor:
    """Return what the new nodes of one session read, float32 `[n, heads, dv]`, and store what they write."""
    num_old, num_new = paths.num_old, paths.num_new
    keys = new.widen(memory.write("key", new.key, num_old))
    decays = memory.write("decay", new.decay, num_old)
    written = memory.write("written", torch.zeros_like(new.value), num_old)
    state = memory.start_state(new.value, (*keys.shape[1:], new.value.shape[2]))
    widen = new.widen  # The closure must not keep the terms alive.
    memory.fold = lambda state, rows: _folded(state, rows["decay"], widen(rows["key"]), rows["written"])
    outputs = torch.empty_like(new.value)
    first = start = 0
    while start < num_new:
        end = min(num_new, start + _MOST_ROWS)
        known = num_old + start
        if known > first and paths.all_see(start, end, first):
            state = _folded(state, decays[first:known], keys[first:known], written[first:known])
            first = known
        width = num_old + end - first
        end = min(end, start + max(1, _MOST_DECAYS // (width * decays[0].numel())))
        slots = slice(first, num_old + end)
        block = _Block(state, keys[slots], decays[slots], paths.attends[start:end, slots], num_old + start - first)
        written[num_old + start : num_old + end] = block.write(new.part(start, end), written[first : num_old + start])
        outputs[start:end] = block.read(new.query[start:end], written[slots])
        start = end
    return outputs


class _Block:
    """Some new nodes and the slots that they may see: `num_old` earlier ones, then their own.

    state: `[heads, dk, dv]`. keys: `[s, heads, dk]`. decays: `[s, heads]` or `[s, heads, dk]`. attends: `[n, s]`.
    """

    def __init__(
        self, state: torch.Tensor, keys: torch.Tensor, decays: torch.Tensor, attends: torch.Tensor, num_old: int
    ) -> None:
        self._state, self._keys, self._num_old = state, keys, num_old
        shape = (*attends.shape, *(1,) * (decays.ndim - 1))
        along = decays * attends.view(shape)
        up_to = along.flip(1).cumsum(1).flip(1)
        # From each slot (excluded) to the node; 0 where the slot is not on its path.
        self._fade = (up_to - along).exp_().mul_(attends.view(shape))
        whole = along.sum(1).exp_()
        self._whole = whole if decays.ndim == 3 else whole[..., None]

    def write(self, new: LinearTerms, old: torch.Tensor) -> torch.Tensor:
        """Return what the nodes write, `[n, heads, dv]`. old: what the slots before them wrote."""
        if new.beta is None:
            return new.value
        beta, num_old = new.beta.T[..., None], self._num_old
        key = self._keys[num_old:]
        seen = self._scores(key)
        read = self._from_state(key) + seen[..., :num_old] @ old.transpose(0, 1)
        solved: torch.Tensor = torch.linalg.solve_triangular(
            beta * seen[..., num_old:].tril(-1),
            beta * (new.value.transpose(0, 1) - read),
            upper=False,
            unitriangular=True,
        )
        return solved.transpose(0, 1)

    def read(self, query: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Return what the nodes read, `[n, heads, dv]`. written: by all slots."""
        return (self._from_state(query) + self._scores(query) @ written.transpose(0, 1)).transpose(0, 1)

    def _from_state(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows * self._whole).transpose(0, 1) @ self._state

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the decayed products of rows `[n, heads, dk]` and all keys, `[heads, n, s]`."""
        if self._fade.ndim == 4:
            return ((self._fade * self._keys) * rows[:, None]).sum(-1).permute(2, 0, 1)
        return rows.transpose(0, 1) @ self._keys.permute(1, 2, 0) * self._fade.permute(2, 0, 1)


def _folded(state: torch.Tensor, decays: torch.Tensor, keys: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return the state `[heads, dk, dv]` after the slots of one path."""
    up_to = decays.flip(0).cumsum(0).flip(0)
    fade, whole = (up_to - decays).exp_(), up_to[0].exp()
    if decays.ndim == 2:
        fade, whole = fade[..., None], whole[..., None]
    return whole[..., None] * state + (keys * fade).permute(1, 2, 0) @ written.transpose(0, 1)
