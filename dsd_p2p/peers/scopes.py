"""Bounds what a peer may take of ours: in all, together with all that came with its invite, and alone.

One invite can let in any number of keys, so a bound per key alone bounds nobody. After the resource manager of
go-libp2p: what has no room is refused before anything is allocated for it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsd_p2p.errors import CapacityError
from dsd_p2p.types import PeerId

_OF_ALL = "are taken here"

RootOf = Callable[[PeerId], str]
"""Returns the invite that a peer came with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scopes:
    """The most that all peers together, the peers of one invite, and one peer may hold of `what`."""

    what: str
    node: int
    root: int
    peer: int

    def check(self, held: Iterable[tuple[PeerId, int]], peer: PeerId, amount: int, root_of: RootOf) -> None:
        """Check that there is room for `amount` more. held: how much each holder has now.

        Whoever holds nothing yet is not refused for the size of what it asks, except by what all hold together.

        Raises:
            CapacityError: there is none; says whose bound is reached.
        """
        root = root_of(peer)
        of_node = of_root = of_peer = amount
        for holder, taken in held:
            of_node += taken
            of_peer += taken * (holder == peer)
            of_root += taken * (holder == peer or root_of(holder) == root)
        for taken, limit, whose in (
            (of_peer, self.peer, "are yours"),
            (of_root, self.root, "belong to peers of your invite"),
            (of_node, self.node, _OF_ALL),
        ):
            if taken > limit and (taken > amount or whose == _OF_ALL):
                raise CapacityError(f"{taken - amount} of {limit} {self.what} {whose}: end some, or try again later")
