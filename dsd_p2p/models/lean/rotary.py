"""Tables of rotations, as complex numbers, from a model's own rotary embedding."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_p2p.errors import ModelError

NO_ROTATION = "none"
"""The table of layers without rotary embedding (SmolLM3 has some)."""

_FIXED = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the length of the text."""


class Rotary:
    """The rotations of every position, by the layers' kind of attention.

    module: transformers' rotary embedding. config: the model's. head_dim: that of all layers.

    Raises:
        ModelError: the frequencies depend on the text's length, or only a part of each head is rotated.
    """

    def __init__(self, module: Any, config: Any, head_dim: int) -> None:
        self._module = module
        self._head_dim = head_dim
        parameters = getattr(config, "rope_parameters", None) or {}
        self._by_kind = all(isinstance(each, dict) for each in parameters.values()) and bool(parameters)
        for each in parameters.values() if self._by_kind else [parameters]:
            if (rope_type := each.get("rope_type", "default")) not in _FIXED:
                raise ModelError(f"rotary embedding of type {rope_type}")
            if each.get("partial_rotary_factor", 1.0) != 1.0:
                raise ModelError("rotary embedding of a part of each head")
        self._tables: dict[str, Tensor] = {}

    def turns(self, kind: str, positions: NDArray[np.int64]) -> Tensor:
        """Return the rotations of some positions, complex `[n, head_dim / 2]`."""
        needed = int(positions.max()) + 1
        name = kind if self._by_kind else ""
        if kind == NO_ROTATION:
            return torch.ones(len(positions), self._head_dim // 2, dtype=torch.complex64)
        table = self._tables.get(name)
        if table is None or len(table) < needed:
            table = self._tables[name] = self._table(kind, max(1024, 2 * needed))
        return table[torch.from_numpy(positions)]

    def _table(self, kind: str, num_positions: int) -> Tensor:
        positions = torch.arange(num_positions)[None]
        arguments = (torch.zeros(1), positions, kind) if self._by_kind else (torch.zeros(1), positions)
        cos, sin = self._module(*arguments)
        half = self._head_dim // 2
        if cos.shape[-1] != self._head_dim:
            raise ModelError("rotary embedding of a part of each head")
        return torch.complex(cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())
