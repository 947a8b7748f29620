"""What a checkpoint offers, whatever its format: tensors by name, read when they are used, and their own 4-bit numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Part = tuple[str, str]
"""A file of the checkpoint and the name of a tensor in it."""

PathOf = Callable[[str], Path]
"""Returns the path of one of the checkpoint's files; fetches it if it is on a hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """A weight in 4-bit numbers. A weight is `number * scale + offset` with the scale and offset of its group of columns.

    numbers: uint8 `[out, in]`, 0 to 15. scales, offsets: float32 `[out, in / size]`. size: the columns of a group.
    """

    numbers: Tensor
    scales: Tensor
    offsets: Tensor
    size: int

    def map(self, rows: Callable[[Tensor], Tensor]) -> "Groups":
        """Return the groups after an operation on the rows of the weight."""
        return Groups(numbers=rows(self.numbers), scales=rows(self.scales), offsets=rows(self.offsets), size=self.size)

    def floats(self) -> Tensor:
        """Return the weight in float32."""
        numbers = self.numbers.view(len(self.numbers), -1, self.size).float()
        return (numbers * self.scales[..., None]).add_(self.offsets[..., None]).flatten(1)


class LazyTensor:
    """A tensor that is read by `tensor[...]`, as transformers' loader does it. read: returns all of it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


class Checkpoint(Protocol):
    """The weight files of a model."""

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors, as transformers expects them."""
        ...

    @property
    def num_params(self) -> int | None:
        """How many weights the model has; None if only the sizes of its files tell."""
        ...

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return what tensor `name` is made of."""
        ...

    def opened(self, names: Iterable[str]) -> AbstractContextManager[Mapping[str, Any]]:
        """Return the tensors by name, each a `LazyTensor` or a slice of safetensors, readable until the context ends."""
        ...

    @property
    def is_quantised(self) -> bool:
        """True if its matrices are not floats."""
        ...

    def groups(self, name: str) -> Groups | None:
        """Return the tensor's 4-bit numbers, or None if it is stored in another way."""
        ...

    def rows(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return what reads single rows of a tensor from disk, `[n]` to `[n, columns]`, or None if that would be slow."""
        ...

    def hashes(self, file: str, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor in `file` and the line that describes it: format, shape and sha256."""
        ...
