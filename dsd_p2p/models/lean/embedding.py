"""Looks up the embeddings of tokens: in memory, or in the checkpoint's own bits on disk."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rows:
    """Embeddings in memory. weight: `[V, H]`."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.num_bytes = weight.nbytes

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map `[n]` to float32 `[n, H]`."""
        return nn.functional.embedding(tokens, self._weight).float()


class RowsOnDisk:
    """Embeddings that are read and dequantised when they are used. scale: what the family multiplies them with.

    read: returns the rows with these numbers, `[n, H]`.
    """

    num_bytes = 0

    def __init__(self, read: Callable[[Tensor], Tensor], scale: float) -> None:
        self._read, self._scale = read, scale

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map `[n]` to float32 `[n, H]`."""
        return self._read(tokens).to(torch.float32).mul_(self._scale)
