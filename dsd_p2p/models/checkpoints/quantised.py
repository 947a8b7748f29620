"""Reads quantised safetensors: GPTQ, AWQ, compressed-tensors, FP8 in blocks and MXFP4.

How it works. In such a checkpoint several tensors make up one weight: packed numbers, scales, offsets. A `Method` knows the
suffixes of these parts for one format, and how to put them together. `QuantisedCheckpoint` shows the model weights
instead of parts, and puts a weight together when it is used.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Groups, LazyTensor, Part
from dsd_p2p.models.checkpoints.methods import Method
from dsd_p2p.models.checkpoints.plain import PlainCheckpoint


class QuantisedCheckpoint:
    """The weights of a quantised checkpoint. plain: its files' tensors. method: how they belong together."""

    def __init__(self, plain: PlainCheckpoint, method: Method) -> None:
        self._plain, self._method = plain, method
        stored = set(plain.names)
        suffix = f"{method.separator}{method.parts[0]}"
        self._owners = {
            f"{owner}{method.target}": owner
            for owner in (name.removesuffix(suffix) for name in stored if name.endswith(suffix))
            # FP8 calls the packed weight by the name of the weight: then it is packed only if it has a scale.
            if f"{owner}{method.separator}{method.parts[1]}" in stored or method.parts[0] != "weight"
        }
        known = (*method.parts, *method.optional, *method.ignored)
        hidden = {f"{owner}{method.separator}{part}" for owner in self._owners.values() for part in known}
        self._others = [name for name in stored if name not in hidden]
        if not self._owners:
            raise ModelError(
                f"the config says that weights are in {method.name}, but no tensor is called *{suffix} with a "
                f"{method.parts[1]}: take another checkpoint"
            )
        for owner in self._owners.values():
            for part in method.parts:
                if f"{owner}{method.separator}{part}" not in stored:
                    raise ModelError(f"a weight in {method.name} lacks {owner}{method.separator}{part}")

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors, as the model has them."""
        return [*self._others, *self._owners]

    @property
    def num_params(self) -> None:
        """Nothing: the sizes of the files tell."""

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return what tensor `name` is made of."""
        return tuple(part for each in self._stored(name) for part in self._plain.parts(each))

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Yield tensors that are put together when they are used."""
        wanted = list(names)
        with self._plain.opened(each for name in wanted for each in self._stored(name)) as tensors:
            yield {
                name: LazyTensor(partial(self.floats, name, tensors)) if name in self._owners else tensors[name]
                for name in wanted
            }

    def floats(self, name: str, tensors: Mapping[str, Any]) -> Tensor:
        """Return a weight in float32."""
        try:
            return self._method.floats(self._read(name, tensors))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as exc:
            raise ModelError(f"{name} is not a weight in {self._method.name}: {exc}") from exc

    @property
    def is_quantised(self) -> bool:
        """True."""
        return True

    def groups(self, name: str) -> Groups | None:
        """Return the weight's 4-bit numbers, or None if it is stored in another way."""
        if name not in self._owners:
            return None
        with self._plain.opened(self._stored(name)) as tensors:
            return self._method.groups(self._read(name, tensors))

    def rows(self, name: str) -> None:
        """Return None: these files are read by whole tensors."""
        del name

    def hashes(self, file: str, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield each stored tensor's name and description."""
        return self._plain.hashes(file, wanted)

    def _stored(self, name: str) -> list[str]:
        """Return the names of the parts of a tensor that are there."""
        if name not in self._owners:
            return [name]
        stored = set(self._plain.names)
        found = (f"{self._owners[name]}{self._method.separator}{part}" for part in self._method.all_parts)
        return [each for each in found if each in stored]

    def _read(self, name: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        prefix = f"{self._owners[name]}{self._method.separator}"
        return {each.removeprefix(prefix): tensors[each][...] for each in self._stored(name)}
