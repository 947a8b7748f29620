"""Defines the effects that a `RequestMachine` returns.

Its driver performs them, and reports back by calling the machine's methods.
"""

from collections.abc import Sequence

import msgspec

from dsd_p2p.errors import DsdError
from dsd_p2p.types import PeerId, TokenId, TokenLogprobs
from dsd_p2p.wire.messages import Cancel, CloseSession, OpenSession, Window

NUM_CANDIDATES = 16
"""Candidates to ask for, however narrow the tree is.

The policy learns from them what a wider tree would hit, and a relaxed tail compares them.
"""


class Stem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node whose children are wanted. path: (key, token) from the root's child to the node; empty for the root."""

    key: int
    path: tuple[tuple[int, TokenId], ...]


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A drafted child: `logprob` is the drafter's own log probability of `token`, `source` the drafter's name.

    children: candidates below it, from a drafter that looks several tokens ahead at once.
    is_complete: the drafter has no further children to propose here, and is not asked for them again.
    """

    token: TokenId
    logprob: float
    source: str = ""
    children: tuple["Candidate", ...] = ()
    is_complete: bool = False


class Draft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Draft the `width` likeliest children of each stem; answer with `RequestMachine.drafted`.

    At most one draft is under way.
    levels: length of the chain wanted below the stem before the next window; a drafter may return all of it at once.
    tokens: prompt and committed tokens, the root last. keys: the key of each token, same length. A key is never reused
    for another token or position, so a drafter may keep its cache by key.
    """

    tokens: Sequence[TokenId]
    keys: Sequence[int]
    stems: tuple[Stem, ...]
    width: int
    levels: int = 1


class Send(msgspec.Struct, frozen=True, kw_only=True):
    """Send `message` to one stage, in order with all other messages to it."""

    to: PeerId
    message: OpenSession | Window | Cancel | CloseSession


class Emit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Give these committed tokens to the user, in order, each once. logprobs: one per token, if requested."""

    tokens: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The route is lost: wait `delay_s`, find one that works, and call `RequestMachine.reopen`.

    If there is no route, call `RequestMachine.route_not_found` instead.
    """

    delay_s: float
    reason: str


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The request is over; no effect follows. error: None unless the request failed."""

    reason: str
    error: DsdError | None = None


class Carried(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """In an attested session: the token just committed at `position` was sent as this node, which the stages signed."""

    position: int
    epoch: int
    node: int


Effect = Draft | Send | Emit | Carried | Replay | Finish
