"""Tracks one session's epoch, root and nodes at one stage, and decides what each window does to the cache.

Follows docs/protocol.md, rule 4: Roots; rule 5: Idempotence. The caller performs the edit, then the pass, and then
forwards the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.cache.slots import CacheEdit, Forward, SlotTable
from dsd_p2p.errors import CapacityError, RemoteProtocolError
from dsd_p2p.wire.messages import BASE, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """A stage's work for one window: edit the cache (None: no change), then run the pass (None: no nodes)."""

    edit: CacheEdit | None
    forward: Forward | None


class StageState:
    """The state of one session at one stage.

    epoch: the first epoch, from `OpenSession`.
    max_length: positions must be below this.
    max_speculative: the most nodes that may wait below the root; this bounds the cache and the masks.
    num_held: positions that the cache holds from the start, as if nodes 0 to `num_held` - 1 had been sent.
    """

    def __init__(self, *, epoch: int, max_length: int, max_speculative: int, num_held: int = 0) -> None:
        self.epoch = epoch
        self._cancelled_below = epoch
        self._max_length = max_length
        self._max_speculative = max_speculative
        self._slots = SlotTable(num_held)
        self._root = num_held - 1 if num_held else BASE
        self._next_node = num_held
        self._last_window = -1

    @property
    def num_settled(self) -> int:
        """Number of positions known to be committed."""
        return self._slots.prefix_length

    def path_slots(self, at: tuple[int, int]) -> NDArray[np.int64]:
        """Return the slots of all positions up to node `at` (epoch, number), or of the settled ones if it is not here."""
        epoch, node = at
        if epoch == self.epoch and node in self._slots:
            return self._slots.path(node)
        return np.arange(self._slots.prefix_length)

    def cancel(self, epoch: int) -> None:
        """Drop windows of epochs below `epoch`, including queued ones."""
        self._cancelled_below = max(self._cancelled_below, epoch)

    def is_stale(self, window: Window) -> bool:
        """Return True for a duplicate and for a window of an earlier epoch."""
        return window.epoch < max(self.epoch, self._cancelled_below) or window.window <= self._last_window

    def accept(self, window: Window, live: Sequence[int] | None = None) -> StageStep | None:
        """Return the work that `window` needs, or None if it is stale.

        live: offsets of the nodes that get a slot; a node's parent must be among them or in the cache. None means all
        nodes; only the tail can leave some out.

        Raises:
            RemoteProtocolError: an epoch too far ahead, a gap in the nodes, an unknown root or parent, or a wrong
                position.
            CapacityError: too many nodes would wait below the root.
        """
        if self.is_stale(window):
            return None
        root_epoch, root = window.root
        if window.epoch != self.epoch:
            self._check_new_epoch(window)
        elif window.first_node != self._next_node:
            raise RemoteProtocolError("first_node", window.first_node, f"{self._next_node}, the next one")
        if root_epoch != self.epoch:
            raise RemoteProtocolError("root epoch", root_epoch, str(self.epoch))
        if root != self._root and root not in self._slots:
            raise RemoteProtocolError("root", root, "a node that descends from the last root")
        if max(window.positions) >= self._max_length:
            raise RemoteProtocolError("position", max(window.positions), f"below the session's {self._max_length}")

        is_new_epoch = window.epoch != self.epoch
        edit = self._settle(root, keep_descendants=not is_new_epoch)
        if is_new_epoch:
            self.epoch, self._root, self._next_node = window.epoch, BASE, 0
        num_speculative = self._slots.num_slots - self._slots.prefix_length + len(window.tokens)
        if num_speculative > self._max_speculative:
            raise CapacityError(
                f"{num_speculative} nodes would wait below the root, at most {self._max_speculative} may: send smaller windows"
            )
        forward = self._append(window, range(len(window.tokens)) if live is None else live)
        self._next_node += len(window.tokens)
        self._last_window = window.window
        return StageStep(edit=edit, forward=forward)

    def resume(self, *, epoch: int, at: tuple[int, int], num_kept: int) -> list[CacheEdit]:
        """Go on in a new epoch as if nodes 0 to `num_kept` - 1 had been sent in it.

        Returns the cache edits that keep only those nodes. at: epoch and number of the node that holds the last token.

        Raises:
            RemoteProtocolError: fewer than `num_kept` positions are held here.
        """
        at_epoch, node = at
        is_speculative = at_epoch == self.epoch and node in self._slots
        edit = self._settle(node if is_speculative else self._root, keep_descendants=False)
        if self._slots.prefix_length < num_kept:
            raise RemoteProtocolError(
                "kept", f"{num_kept} tokens", f"at most the {self._slots.prefix_length} held here"
            )
        edits = [] if edit is None else [edit]
        if self._slots.prefix_length > num_kept:
            edits.append(self._slots.rewind(num_kept))
        self.epoch = self._cancelled_below = epoch
        self._root, self._next_node = num_kept - 1, num_kept
        return edits

    def _append(self, window: Window, offsets: Sequence[int]) -> Forward | None:
        if not offsets:
            return None
        parents = [window.parents[offset] for offset in offsets]
        return self._slots.append(
            [self._next_node + offset for offset in offsets],
            [None if parent == self._root else parent for parent in parents],
            [window.positions[offset] for offset in offsets],
        )

    def _check_new_epoch(self, window: Window) -> None:
        if window.epoch != self.epoch + 1:
            raise RemoteProtocolError("epoch", window.epoch, f"{self.epoch} or {self.epoch + 1}")
        if window.first_node != 0 or window.parents[0] != BASE:
            raise RemoteProtocolError("first_node", window.first_node, "0 under the root, to open an epoch")

    def _settle(self, root: int, *, keep_descendants: bool) -> CacheEdit | None:
        edit = None if root == self._root else self._slots.settle(root)
        self._root = root
        if keep_descendants:
            return edit
        drop = self._slots.settle(None)
        if edit is None or drop is None:
            return edit or drop
        # The dropped descendants follow the joined path in the cache, so shorten the first edit instead of doing both.
        return CacheEdit(
            num_kept=min(edit.num_kept, self._slots.prefix_length),
            gathered=edit.gathered[: max(0, self._slots.prefix_length - edit.num_kept)],
        )
