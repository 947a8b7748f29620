"""Cuts the views that the lean layers work on: one pass over the rows of one session."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.cache.slots import Forward
from dsd_p2p.models.lean.build import Built, Heads
from dsd_p2p.models.lean.cache import LeanCache
from dsd_p2p.models.lean.layer import CHUNK, FEWEST_HEAD_ROWS, LONGEST_SUM, SLOT_PAD, Attention, Part, Slots
from dsd_p2p.models.lean.rotary import Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One session's rows of a pass. attends: bool `[n, slots]` for each kind of attention."""

    cache: LeanCache
    forward: Forward
    attends: dict[str, NDArray[np.bool_]]


class SessionViews:
    """What the layers need of one session: a `Part` for all layers, `Slots` for each, `Attention` for each kind."""

    def __init__(
        self, segment: Segment, y: Tensor, out: Tensor, layers: Sequence[Built], rotary: Rotary, heads: Heads
    ) -> None:
        num_rows = len(segment.forward.positions)
        self._num_rows, self._heads = num_rows, heads
        # Products over too few rows take another kernel.
        self._padded_rows = max(num_rows, -(-FEWEST_HEAD_ROWS // heads.group))
        first = segment.cache.num_slots
        self._end = first + num_rows
        # At least one slot is spare.
        num_slots = (self._end // SLOT_PAD + 1) * SLOT_PAD
        self.part = self._part(y, out)
        kv = segment.cache.kv
        new = kv[:, :, :, first : self._end]
        new_keys = _complex(new[:, 0]).transpose(1, 2).unbind(0)
        new_values = new[:, 1].transpose(1, 2).unbind(0)
        keys = kv[:, 0, :, :num_slots].transpose(2, 3).unbind(0)
        values = kv[:, 1, :, :num_slots].unbind(0)
        self.slots = [
            Slots(new_keys=a, new_values=b, keys=c, values=d)
            for a, b, c, d in zip(new_keys, new_values, keys, values, strict=True)
        ]
        bounds, gathered = _chunks(segment.forward, num_slots - 1)
        kinds = {(layer.kind, layer.rotation) for layer in layers}
        self.attention: dict[tuple[str, str], Attention] = {}
        for kind, rotation in kinds:
            turns = rotary.turns(rotation, segment.forward.positions)
            mask = self._mask(segment.attends[kind], num_slots)
            self.attention[kind, rotation] = Attention(
                q_turns=turns[:, None, None], k_turns=turns[:, None], mask=mask, bounds=bounds, gathered=gathered
            )

    def _part(self, y: Tensor, out: Tensor) -> Part:
        heads, num_rows = self._heads, self._num_rows
        num_q, num_kv, head_dim, group = heads.num_q, heads.num_kv, heads.head_dim, heads.group
        queries = y.new_zeros(num_kv, self._padded_rows, group, head_dim)
        attended = y.new_empty(num_kv, self._padded_rows * group, head_dim)
        return Part(
            q_in=_complex(y[:, : num_q * head_dim].view(num_rows, num_kv, group, head_dim)),
            k_in=_complex(y[:, num_q * head_dim : (num_q + num_kv) * head_dim].view(num_rows, num_kv, head_dim)),
            v_in=y[:, (num_q + num_kv) * head_dim :].view(num_rows, num_kv, head_dim),
            q_out=_complex(queries[:, :num_rows]).transpose(0, 1),
            queries=queries.view(num_kv, self._padded_rows * group, head_dim),
            attended=attended,
            result=attended.view(num_kv, self._padded_rows, group, head_dim)[:, :num_rows].transpose(0, 1),
            target=out.view(num_rows, num_kv, group, head_dim),
        )

    def _mask(self, attends: NDArray[np.bool_], num_slots: int) -> Tensor:
        rows, group = self._padded_rows, self._heads.group
        mask = np.zeros((rows, 1, num_slots), np.float32)
        mask[: self._num_rows] = -np.inf
        mask[: self._num_rows, 0, : self._end][attends] = 0
        return torch.from_numpy(mask).expand(rows, group, num_slots).reshape(1, rows * group, num_slots)


def _chunks(forward: Forward, spare: int) -> tuple[list[int], list[Tensor]]:
    """Cut the slots by the position of their tokens, because a drafted node's ancestors may leave gaps.

    Return the first and last slot of each chunk, flat, and the slots of each chunk that is not simply between them. Their
    numbers are multiples of `SLOT_PAD`, because MKL takes other kernels for short sums. spare: a slot that no row sees.
    """
    num_slots = len(forward.slot_positions)
    seen = np.zeros(-(-num_slots // SLOT_PAD) * SLOT_PAD, np.bool_)
    seen[:num_slots] = forward.mask.any(axis=0)
    numbers = np.zeros(len(seen), np.int64)
    numbers[:num_slots] = forward.slot_positions // CHUNK
    bounds: list[int] = []
    gathered: list[Tensor] = []
    for number in range(int(numbers.max()) + 1):
        members = np.flatnonzero(seen & (numbers == number))
        if not len(members):
            continue
        first = int(members[0]) // SLOT_PAD * SLOT_PAD
        end = -(-(int(members[-1]) + 1) // SLOT_PAD) * SLOT_PAD
        bounds += [first, end]
        if end - first <= LONGEST_SUM and seen[first:end].sum() == len(members):
            gathered.append(torch.empty(0, dtype=torch.int64))
            continue
        padded = np.full(-(-len(members) // SLOT_PAD) * SLOT_PAD, spare)
        padded[: len(members)] = members
        gathered.append(torch.from_numpy(padded))
    return bounds, gathered


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2))
