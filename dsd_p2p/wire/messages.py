"""The messages of the protocol (docs/protocol.md), in the order they appear in a session's life.

Every message carries what makes it idempotent (session, epoch, window number, start position), so nothing is
acknowledged. Field types and lengths are checked when a frame is decoded (`dsd_p2p.wire.codec`); what needs the state of a session
(unknown parent, epoch from the future) is checked by `dsd_p2p.session`.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.types import (
    MAX_POSITIONS,
    Address,
    Endpoint,
    HiddenFormat,
    ModelKey,
    Name,
    PeerInfo,
    Position,
    Span,
    StageCost,
    TextRequest,
    Token,
    TokenLogprobs,
)
from dsd_p2p.wire.membership import MAX_GRANTS, Grant, Heartbeat, Members

MAX_WINDOW_NODES = 1024
MAX_STAGES = 64
MAX_KNOWN_PEERS = 64
MAX_DRAFT_TOP = 32
MAX_PING_BYTES = 256 << 10
ROW_HASH_BYTES = 16
MAX_ATTESTED_WINDOWS = 512
MAX_RECOMPUTED = 4096
MAX_GAP = 1_000_000
MAX_WAITED = 1 << 40
WAITED_PER_S = 10_000
"""Unit of `waited`: a tenth of a millisecond."""
FILL_NODES = 128
"""Nodes of each window, numbered from 0, with which a stage refills the one after it."""

SessionBytes = Annotated[bytes, Meta(min_length=8, max_length=8)]
MAX_EPOCH = (1 << 31) - 1
Epoch = Annotated[int, Meta(ge=0, le=MAX_EPOCH)]
WindowNumber = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
NodeNumber = Annotated[int, Meta(ge=-1, le=MAX_POSITIONS)]
Centinats = Annotated[int, Meta(ge=0, le=100_000)]

BASE = -1
"""Node number of what an epoch hangs under: the root its first window names, or the empty text."""


class FailureKind(StrEnum):
    """Why a peer cannot go on with a session; each maps to one class of `dsd_p2p.errors`."""

    CAPACITY = "capacity"
    PROTOCOL = "protocol"
    MODEL = "model"
    ROUTE = "route"
    TIMEOUT = "timeout"
    COVERAGE = "coverage"
    REQUEST = "request"
    PREFIX = "prefix"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message on every stream: the sender and the peers it knows; in a swarm, what lets it in."""

    version: int
    sender: PeerInfo
    known: Annotated[tuple[PeerInfo, ...], Meta(max_length=MAX_KNOWN_PEERS)] = ()
    grants: Annotated[tuple[Grant, ...], Meta(max_length=MAX_GRANTS)] = ()


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """One stage of a route: which peer, its address, and the layers it is asked to run."""

    peer: Name
    address: Address
    span: Span


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """The first tokens of a text that the stages have parked: those of `session`, which its coordinator closed."""

    session: SessionBytes
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]


class Park(msgspec.Struct, frozen=True, array_like=True):
    """What a stage is to hold of a session that closes: the text up to the node `at` (epoch, node), `num_tokens` long."""

    at: tuple[Epoch, NodeNumber]
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]


class OpenSession(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Opens a session at `epoch` on every stage of `route`; travels down the route ahead of the windows.

    The first `num_prompt` tokens are the prompt. The first `num_given` are given: the prompt and, in a replay, the tokens
    that were committed before. The tail does not verify what is given.
    Received again with a higher epoch, it resets the session: nothing of the old epochs is kept.
    formats: of the hidden states on each link between stages; empty is the model's own on all of them.
    kept: for each stage of the route, whether it goes on with what it holds of the session: everything given but the last
        token, which ends at node `resume` (epoch, node). The others are refilled by the stage before them. Empty: no
        stage keeps anything.
    attest: every stage signs what it takes in and gives out.
    prefix: parked text that the prompt begins with; only what follows is sent.
    """

    session: SessionBytes
    epoch: Epoch
    route: Annotated[tuple[Hop, ...], Meta(min_length=1, max_length=MAX_STAGES)]
    coordinator: Endpoint
    model: ModelKey
    text: TextRequest
    num_prompt: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    num_given: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    idle_timeout_s: Annotated[float, Meta(gt=0, le=3600)]
    formats: Annotated[tuple[HiddenFormat, ...], Meta(max_length=MAX_STAGES - 1)] = ()
    kept: Annotated[tuple[bool, ...], Meta(max_length=MAX_STAGES)] = ()
    resume: tuple[Epoch, NodeNumber] = (0, BASE)
    attest: bool = False
    prefix: Prefix | None = None

    @property
    def max_length(self) -> int:
        """Length of the finished text at most, prompt included."""
        return self.num_prompt + self.text.max_tokens


class Attestation(msgspec.Struct, frozen=True, array_like=True):
    """What a stage signs of one window: a hash of each node's input and of each node's output (none at the tail)."""

    inputs: Annotated[bytes, Meta(max_length=MAX_WINDOW_NODES * ROW_HASH_BYTES)]
    outputs: Annotated[bytes, Meta(max_length=MAX_WINDOW_NODES * ROW_HASH_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class WindowAttestation(msgspec.Struct, frozen=True, array_like=True):
    """What every stage of the route signed of one window, head first."""

    window: WindowNumber
    stages: Annotated[tuple[Attestation, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class DraftTop(msgspec.Struct, frozen=True, array_like=True):
    """What the drafter expects after one node of a window: its likeliest tokens and -100 times the ln of their probabilities."""

    offset: Annotated[int, Meta(ge=0, lt=MAX_WINDOW_NODES)]
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_DRAFT_TOP)]
    centinats: Annotated[tuple[Centinats, ...], Meta(min_length=1, max_length=MAX_DRAFT_TOP)]


class Window(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Draft nodes on their way down the route; after the first stage the frame's payload is their hidden states `[n, H]`.

    root: the newest node known to be committed, as (epoch, node number).
    first_node: number of the first node; the others follow by one.
    parents: node number within this epoch of each node's parent, `BASE` for the node that opens the epoch.
    costs: of each stage passed so far. waited: between arrivals there and the passes, tenths of a millisecond, summed over them.
    link_bytes: bytes of window frames that the stages passed so far have received in this session.
    drafts: in relaxed mode, what the drafter expects after some of the nodes. attestations: of the stages passed so far.
    """

    session: SessionBytes
    epoch: Epoch
    window: WindowNumber
    root: tuple[Epoch, NodeNumber]
    first_node: NodeNumber
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    parents: Annotated[tuple[NodeNumber, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    positions: Annotated[tuple[Position, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    costs: Annotated[tuple[StageCost, ...], Meta(max_length=MAX_STAGES)] = ()
    link_bytes: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    drafts: Annotated[tuple[DraftTop, ...], Meta(max_length=MAX_WINDOW_NODES)] = ()
    attestations: Annotated[tuple[Attestation, ...], Meta(max_length=MAX_STAGES)] = ()
    waited: Annotated[int, Meta(ge=0, le=MAX_WAITED)] = 0


class Verdict(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Tail → coordinator: `tokens` are the target's own picks from `start_pos` on; never empty.

    settled: for each token the node that holds it in the tail's cache, or `BASE` where none did yet.
    num_live, num_stale: nodes of the window that descended from the tail's position, and those that did not.
    num_relaxed: of `tokens`, those that the target itself would have written differently.
    attestations: of every window since the last verdict. logprobs: one a token, where they were asked for.
    """

    session: SessionBytes
    epoch: Epoch
    window: WindowNumber
    start_pos: Position
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    settled: Annotated[tuple[NodeNumber, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    num_live: Annotated[int, Meta(ge=0, le=MAX_WINDOW_NODES)] = 0
    num_stale: Annotated[int, Meta(ge=0, le=MAX_WINDOW_NODES)] = 0
    costs: Annotated[tuple[StageCost, ...], Meta(max_length=MAX_STAGES)] = ()
    link_bytes: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    num_relaxed: Annotated[int, Meta(ge=0, le=MAX_WINDOW_NODES)] = 0
    attestations: Annotated[tuple[WindowAttestation, ...], Meta(max_length=MAX_ATTESTED_WINDOWS)] = ()
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_WINDOW_NODES)] = ()
    waited: Annotated[int, Meta(ge=0, le=MAX_WAITED)] = 0


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Coordinator → every stage: drop queued windows of epochs below `epoch`."""

    session: SessionBytes
    epoch: Epoch


class CloseSession(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Coordinator → every stage: free the session's cache now; the session may be opened again at a later epoch only.

    park: what of it to hold as long as nobody needs the room, for other sessions of the same coordinator.
    """

    session: SessionBytes
    epoch: Epoch
    park: Park | None = None


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Stage → coordinator: the session opened at `epoch` cannot go on here, and why. peer: the neighbour that it does not reach."""

    session: SessionBytes
    epoch: Epoch
    kind: FailureKind
    text: Annotated[str, Meta(max_length=512)]
    peer: Name = ""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Asks for a `Pong` with the same nonce: the round trip of the very stream that windows travel on.

    padding: what makes the way there take as long as so many bytes do.
    """

    nonce: Annotated[int, Meta(ge=0, le=(1 << 62))]
    padding: Annotated[bytes, Meta(max_length=MAX_PING_BYTES)] = b""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Answer to a `Ping`."""

    nonce: Annotated[int, Meta(ge=0, le=(1 << 62))]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Thin client → coordinator: write this text for me.

    num_written: the last tokens of `prompt` that another coordinator wrote of the same answer already.
    owner: answers of one owner share parked text; those without an owner ("") share none.
    idle_timeout_s: how long a silent route is waited for. deadline_s: of the whole answer, counted from the message's arrival.
    """

    request: SessionBytes
    prompt: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_POSITIONS)]
    text: TextRequest
    idle_timeout_s: Annotated[float, Meta(gt=0, le=3600)]
    deadline_s: Annotated[float, Meta(gt=0, le=86400)]
    num_written: Annotated[int, Meta(ge=0, le=MAX_POSITIONS)] = 0
    owner: Name = ""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Coordinator → thin client: the tokens from number `start` of this answer on."""

    request: SessionBytes
    start: Position
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_WINDOW_NODES)] = ()


class AnswerEnd(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Coordinator → thin client: nothing more comes. error: None when it ended as asked."""

    request: SessionBytes
    reason: Name
    error: FailureKind | None = None
    text: Annotated[str, Meta(max_length=512)] = ""


class StopAnswer(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """Thin client → coordinator: no more is wanted."""

    request: SessionBytes


class Reveal(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Coordinator → stage: show the hidden states that you sent on for positions below `end`, all committed."""

    session: SessionBytes
    end: Annotated[int, Meta(ge=1, le=MAX_RECOMPUTED)]


class Revealed(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """Stage → coordinator: the payload is those hidden states, as they were sent; fewer rows when fewer are settled."""

    session: SessionBytes
    num_rows: Annotated[int, Meta(ge=0, le=MAX_RECOMPUTED)]


class Recompute(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """Coordinator → a peer that holds the span: compute it over a text from its start.

    tokens: of the text, the first `num_prompt` of them its prompt. text: how the tail picks.
    The payload is the hidden states before the span, as the model computes them; none at the head.
    """

    request: SessionBytes
    span: Span
    model: ModelKey
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_RECOMPUTED)]
    text: TextRequest
    num_prompt: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]


class Recomputed(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """The payload is the hidden states after the span; at the tail `picks` are the target's tokens for positions 1 and on.

    gaps: thousandths of a logit by which the text's own tokens miss being those. error: why nothing was computed.
    """

    request: SessionBytes
    picks: Annotated[tuple[Token, ...], Meta(max_length=MAX_RECOMPUTED)] = ()
    gaps: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_GAP)], ...], Meta(max_length=MAX_RECOMPUTED)] = ()
    error: Annotated[str, Meta(max_length=512)] = ""


Message = (
    Hello
    | OpenSession
    | Window
    | Verdict
    | Cancel
    | CloseSession
    | Failure
    | Ping
    | Pong
    | Heartbeat
    | Members
    | Ask
    | Answer
    | AnswerEnd
    | StopAnswer
    | Reveal
    | Revealed
    | Recompute
    | Recomputed
)
