"""The inputs of a pass over shared slots, in buffers whose sizes come from few buckets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.cache.passes import SpanPass
from dsd_p2p.models.architecture import LayerShape
from dsd_p2p.models.rows import attends_by_kind

MAX_CAPTURED_ROWS = 64
"""Larger passes read prompts. Their kernels take longer than their launches, and few have the same size."""

_SLOTS_OF_PROMPTS, _FEWEST_SLOTS = 64, 128


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes of a pass: its rows, the slots that they see, and the rows whose logits are wanted."""

    rows: int
    slots: int
    wanted: int

    @classmethod
    def of(cls, rows: int, slots: int, wanted: int) -> "Bucket":
        """Return the smallest bucket that these fit into."""
        if rows > MAX_CAPTURED_ROWS:
            return cls(rows, -(-slots // _SLOTS_OF_PROMPTS) * _SLOTS_OF_PROMPTS, wanted)
        return cls(_power(rows), max(_FEWEST_SLOTS, _power(slots)), _power(wanted) if wanted else 0)

    @property
    def is_captured(self) -> bool:
        """True for a pass of a size that comes again and again."""
        return self.rows <= MAX_CAPTURED_ROWS


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of several sessions in one pass, in numpy.

    positions: int64 `[n]`. written: the arena's slot of each row, int64 `[n]`. read: the slots of all sessions, int64
    `[slots]`. attends: for each kind of attention the slots that each row sees, bool `[n, slots]`. wanted: int64.
    """

    positions: NDArray[np.int64]
    written: NDArray[np.int64]
    read: NDArray[np.int64]
    attends: dict[str, NDArray[np.bool_]]
    wanted: NDArray[np.int64]

    @classmethod
    def of(cls, passes: Sequence[SpanPass], layers: Sequence[LayerShape]) -> "Rows":
        """Return the passes' rows side by side. A row sees only slots of its own session."""
        reads = [each.cache.slots(each.num_rows) for each in passes]
        num_rows, num_slots = sum(each.num_rows for each in passes), sum(map(len, reads))
        attends = {layer.kind: np.zeros((num_rows, num_slots), np.bool_) for layer in layers}
        wanted: list[int] = []
        row = slot = 0
        for each, read in zip(passes, reads, strict=True):
            for kind, mask in attends_by_kind(each.forward, layers).items():
                attends[kind][row : row + each.num_rows, slot : slot + len(read)] = mask
            wanted += [row + index for index in each.wanted]
            row, slot = row + each.num_rows, slot + len(read)
        return cls(
            positions=np.concatenate([each.forward.positions for each in passes]),
            written=np.concatenate([read[-each.num_rows :] for each, read in zip(passes, reads, strict=True)]),
            read=np.concatenate(reads),
            attends=attends,
            wanted=np.array(wanted, np.int64),
        )

    @property
    def bucket(self) -> Bucket:
        """The sizes of the buffers that hold them."""
        return Bucket.of(len(self.positions), len(self.read), len(self.wanted))


class Buffers:
    """The inputs of every pass of one bucket, on the device.

    inputs: token ids `[1, rows]` or hidden states `[1, rows, H]`. masks: bool `[1, 1, rows, slots]` by kind.
    """

    def __init__(self, bucket: Bucket, inputs: Tensor, kinds: Sequence[str]) -> None:
        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64, device=inputs.device)

        self.inputs = inputs.new_zeros(1, bucket.rows, *inputs.shape[2:])
        self.positions = integers(bucket.rows)[None]
        self.written, self.read, self.wanted = (integers(count) for count in (bucket.rows, bucket.slots, bucket.wanted))
        shape = (1, 1, bucket.rows, bucket.slots)
        self.masks = {kind: torch.zeros(shape, dtype=torch.bool, device=inputs.device) for kind in kinds}

    def fill(self, rows: Rows, inputs: Tensor) -> None:
        """Write the rows of a pass. What is left of the bucket reads and writes slot 0."""
        num_rows = len(rows.positions)
        self.inputs.zero_()
        self.inputs[:, :num_rows] = inputs
        for buffer, values in (
            (self.positions[0], rows.positions),
            (self.written, rows.written),
            (self.read, rows.read),
            (self.wanted, rows.wanted),
        ):
            buffer.copy_(torch.from_numpy(np.pad(values, (0, len(buffer) - len(values)))))
        for kind, buffer in self.masks.items():
            mask = np.zeros(buffer.shape, np.bool_)
            mask[0, 0, :num_rows, : len(rows.read)] = rows.attends[kind]
            # A row that sees nothing would have no softmax.
            mask[0, 0, num_rows:, 0] = True
            buffer.copy_(torch.from_numpy(mask))
