"""What the coordinator machine asks its driver to do; the driver reports back with `RequestMachine`'s methods."""

from collections.abc import Sequence

import msgspec

from dsd_p2p.errors import DsdError
from dsd_p2p.types import PeerId, TokenId, TokenLogprobs
from dsd_p2p.wire.messages import Cancel, CloseSession, OpenSession, Window

NUM_CANDIDATES = 16
"""Candidates asked for, however narrow the tree: the policy learns what a wider one would hit, a relaxed tail compares them."""


class Stem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node whose children are wanted: the path from the root's child down to it as (key, token); empty for the root."""

    key: int
    path: tuple[tuple[int, TokenId], ...]


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A drafted child: `logprob` is the drafter's own log probability of `token`, `source` the drafter's name.

    children: what a drafter that looks several tokens ahead at once proposes below it.
    is_complete: these children are all it has to propose there; it is not asked again.
    """

    token: TokenId
    logprob: float
    source: str = ""
    children: tuple["Candidate", ...] = ()
    is_complete: bool = False


class Draft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Draft the `width` likeliest children of each stem; answer with `RequestMachine.drafted`. At most one is under way.

    levels: how long a chain below the stem is wanted before the next window; a drafter may answer all of it at once.
    tokens: prompt and committed tokens, the root last. keys: the name of each of them, same length; a key never
    comes back with another token or position, so a drafter may keep its cache by it.
    """

    tokens: Sequence[TokenId]
    keys: Sequence[int]
    stems: tuple[Stem, ...]
    width: int
    levels: int = 1


class Send(msgspec.Struct, frozen=True, kw_only=True):
    """Send `message` to one stage, in order with everything else sent to it."""

    to: PeerId
    message: OpenSession | Window | Cancel | CloseSession


class Emit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Give these tokens to the user: committed, in order, never repeated. logprobs: one a token, where they were asked for."""

    tokens: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The route is lost: after `delay_s` find one that works, then call `RequestMachine.reopen`."""

    delay_s: float
    reason: str


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The request is over; nothing follows. `error` is None when it ended as asked."""

    reason: str
    error: DsdError | None = None


class Carried(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """In an attested session: the token just committed at `position` travelled as this node, so its stages signed it."""

    position: int
    epoch: int
    node: int


Effect = Draft | Send | Emit | Carried | Replay | Finish
