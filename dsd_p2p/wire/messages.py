"""Defines the messages of the protocol (docs/protocol.md), in the order of a session's life.

The fields of every message (session, epoch, window number, start position) make it idempotent, so nothing is
acknowledged. `dsd_p2p.wire.codec` checks field types and lengths when it decodes a frame. `dsd_p2p.session` checks the
rules that depend on a session's state, such as an unknown parent or an epoch from the future.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from dsd_p2p.types import (
    MAX_POSITIONS,
    MAX_TOKEN,
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
from dsd_p2p.wire.drafts import AskDraft, Drafted, EndDrafts, OpenDrafts
from dsd_p2p.wire.hints import AskHint, Hint
from dsd_p2p.wire.membership import MAX_GRANTS, Grant, Heartbeat, Members, Rekey, SignatureBytes

MAX_WINDOW_NODES = 1024
MAX_IDLE_S = 3600
MAX_STAGES = 64
MAX_KNOWN_PEERS = 64
MAX_DRAFT_TOP = 32
MAX_PING_BYTES = 256 << 10
ROW_HASH_BYTES = 16
MAX_ATTESTED_WINDOWS = 512
MAX_RECOMPUTED = 4096
MAX_REVEALED, MAX_REVEALED_BYTES = 256, 16 << 20
MAX_GAP = 1_000_000
MAX_WAITED = MAX_MICRONATS = 1 << 40
WAITED_PER_S = 10_000
"""The unit of `waited` is a tenth of a millisecond."""
FILL_NODES = 128
"""The number of nodes in each window with which a stage refills the next one; they are numbered from 0."""

SessionBytes = Annotated[bytes, Meta(min_length=8, max_length=8)]
MAX_EPOCH = (1 << 31) - 1
Epoch = Annotated[int, Meta(ge=0, le=MAX_EPOCH)]
WindowNumber = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
NodeNumber = Annotated[int, Meta(ge=-1, le=MAX_POSITIONS)]
Centinats = Annotated[int, Meta(ge=0, le=100_000)]

BASE = -1
"""The node number of an epoch's base: the root that its first window names, or the empty text."""


class FailureKind(StrEnum):
    """The reason why a peer cannot go on with a session; each maps to one class of `dsd_p2p.errors`."""

    CAPACITY = "capacity"
    PROTOCOL = "protocol"
    MODEL = "model"
    ROUTE = "route"
    LEAVING = "leaving"
    TIMEOUT = "timeout"
    COVERAGE = "coverage"
    REQUEST = "request"
    PREFIX = "prefix"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The first message on every stream: the sender, the peers it knows and, in a swarm, its grants."""

    version: int
    sender: PeerInfo
    known: Annotated[tuple[PeerInfo, ...], Meta(max_length=MAX_KNOWN_PEERS)] = ()
    grants: Annotated[tuple[Grant, ...], Meta(max_length=MAX_GRANTS)] = ()


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """One stage of a route: its peer, the peer's address, and the layers to run."""

    peer: Name
    address: Address
    span: Span


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """The first tokens of the parked text of `session`, which its coordinator has closed."""

    session: SessionBytes
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]


class Park(msgspec.Struct, frozen=True, array_like=True):
    """The text that a stage should park when a session closes: `num_tokens` long, up to node `at` (epoch, node)."""

    at: tuple[Epoch, NodeNumber]
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]


class OpenSession(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Coordinator → head → … → tail: open a session at `epoch`. It goes down the route ahead of the windows.

    The first `num_prompt` tokens are the prompt. The first `num_given` are given: the prompt and, in a replay, the
    tokens committed before it. The tail does not verify given tokens.
    The same session with a higher epoch replaces the open one. Only the stages marked in `kept` keep what they hold.
    formats: of the hidden states on each link between stages; empty means the model's own on all links.
    kept: for each stage of the route, whether it goes on with what it holds of the session: all given tokens but the
        last, ending at node `resume` (epoch, node). The stage before refills each of the others. If empty, no stage
        keeps anything.
    attest: every stage signs hashes of its inputs and outputs.
    prefix: parked text with which the prompt begins. The windows carry only the rest.
    signature: the coordinator's, over all other fields (`signed_opening`).
    """

    session: SessionBytes
    epoch: Epoch
    route: Annotated[tuple[Hop, ...], Meta(min_length=1, max_length=MAX_STAGES)]
    coordinator: Endpoint
    model: ModelKey
    text: TextRequest
    num_prompt: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    num_given: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    idle_timeout_s: Annotated[float, Meta(gt=0, le=MAX_IDLE_S)]
    formats: Annotated[tuple[HiddenFormat, ...], Meta(max_length=MAX_STAGES - 1)] = ()
    kept: Annotated[tuple[bool, ...], Meta(max_length=MAX_STAGES)] = ()
    resume: tuple[Epoch, NodeNumber] = (0, BASE)
    attest: bool = False
    prefix: Prefix | None = None
    signature: SignatureBytes = b""

    @property
    def max_length(self) -> int:
        """The greatest length of the finished text in tokens, including the prompt."""
        return self.num_prompt + self.text.max_tokens


class Attestation(msgspec.Struct, frozen=True, array_like=True):
    """One stage's signature for a window, over a hash of each node's input and output row."""

    inputs: Annotated[bytes, Meta(max_length=MAX_WINDOW_NODES * ROW_HASH_BYTES)]
    outputs: Annotated[bytes, Meta(max_length=MAX_WINDOW_NODES * ROW_HASH_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class WindowAttestation(msgspec.Struct, frozen=True, array_like=True):
    """The attestations of all stages of the route for one window, head first."""

    window: WindowNumber
    stages: Annotated[tuple[Attestation, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class DraftTop(msgspec.Struct, frozen=True, array_like=True):
    """The drafter's likeliest tokens after one node of a window.

    offset: the node's index in the window. centinats: -100 times the natural logarithm of each token's probability.
    """

    offset: Annotated[int, Meta(ge=0, lt=MAX_WINDOW_NODES)]
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_DRAFT_TOP)]
    centinats: Annotated[tuple[Centinats, ...], Meta(min_length=1, max_length=MAX_DRAFT_TOP)]


class Window(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Coordinator → head → … → tail: nodes to verify. After the head, the payload is their hidden states `[n, H]`.

    root: the newest node known to be committed, as (epoch, node number).
    first_node: the number of the first node; the others are numbered consecutively.
    parents: the number of each node's parent in this epoch; `BASE` for the node that opens the epoch.
    costs, attestations: one of each stage passed so far.
    waited: time between arrival and pass, summed over the stages passed so far, in tenths of a millisecond.
    link_bytes: the bytes of this session's window frames that the stages passed so far have received.
    drafts: in relaxed mode, the drafter's likeliest tokens after some of the nodes.
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
    """Tail → coordinator: the tokens that the tail commits, from `start_pos` on; never empty.

    settled: for each token the node that holds it in the tail's cache, or `BASE` if none does yet.
    num_live, num_stale: how many of the window's nodes descend from the tail's position, and how many do not.
    num_relaxed: how many of `tokens` differ from the target's own pick (relaxed mode). relaxed_micronats: what they cost
        by the target's likelihood, in millionths of a nat.
    attestations: of every window since the last verdict. logprobs: one for each token, if the request asked for them.
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
    relaxed_micronats: Annotated[int, Meta(ge=0, le=MAX_MICRONATS)] = 0


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Coordinator → every stage: drop the queued windows of epochs below `epoch`."""

    session: SessionBytes
    epoch: Epoch


class CloseSession(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Coordinator → every stage: end the session now. It can be opened again only at a later epoch.

    park: the part of the text to hold for other sessions of this coordinator while nobody needs the room; None: free
    all.
    """

    session: SessionBytes
    epoch: Epoch
    park: Park | None = None


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Stage → coordinator: the session opened at `epoch` cannot go on here, and why.

    peer: the neighbour that the failure is about, or empty.
    """

    session: SessionBytes
    epoch: Epoch
    kind: FailureKind
    text: Annotated[str, Meta(max_length=512)]
    peer: Name = ""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A request for a `Pong` with the same nonce. It measures the round trip on the stream that windows use.

    padding: filler, so that sending the ping takes as long as sending that many bytes.
    """

    nonce: Annotated[int, Meta(ge=0, le=(1 << 62))]
    padding: Annotated[bytes, Meta(max_length=MAX_PING_BYTES)] = b""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The answer to a `Ping`, with its nonce."""

    nonce: Annotated[int, Meta(ge=0, le=(1 << 62))]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Thin client → coordinator: generate this text for me.

    num_written: how many of the last tokens of `prompt` another coordinator has already written as part of this answer.
    owner: answers of one owner share parked text; answers without an owner ("") share none.
    idle_timeout_s: how long to wait for a silent route. deadline_s: for the whole answer, from the message's arrival.
    """

    request: SessionBytes
    prompt: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_POSITIONS)]
    text: TextRequest
    idle_timeout_s: Annotated[float, Meta(gt=0, le=MAX_IDLE_S)]
    deadline_s: Annotated[float, Meta(gt=0, le=86400)]
    num_written: Annotated[int, Meta(ge=0, le=MAX_POSITIONS)] = 0
    owner: Name = ""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Coordinator → thin client: tokens of the answer, the first of them at index `start`."""

    request: SessionBytes
    start: Position
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_WINDOW_NODES)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_WINDOW_NODES)] = ()


class AnswerEnd(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Coordinator → thin client: the answer is over. error: None if it ended normally."""

    request: SessionBytes
    reason: Name
    error: FailureKind | None = None
    text: Annotated[str, Meta(max_length=512)] = ""


class StopAnswer(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """Thin client → coordinator: stop generating this answer."""

    request: SessionBytes


class Reveal(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Coordinator → stage: send me the rows that you signed for the committed positions from `start` up to `end`.

    at: the node (epoch, number) at position `end` - 1, which the stage may not know to be committed.
    """

    session: SessionBytes
    start: Annotated[int, Meta(ge=0, lt=MAX_RECOMPUTED)]
    end: Annotated[int, Meta(ge=1, le=MAX_RECOMPUTED)]
    at: tuple[Epoch, NodeNumber]


class Revealed(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """Stage → coordinator: the payload is those rows from `start` on; fewer, if the stage holds fewer."""

    session: SessionBytes
    start: Annotated[int, Meta(ge=0, lt=MAX_RECOMPUTED)]
    num_rows: Annotated[int, Meta(ge=0, le=MAX_RECOMPUTED)]


class Recompute(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """Coordinator → replica: run the span over a whole text.

    tokens: the text; the first `num_prompt` of them are its prompt. text: how the tail picks tokens.
    following: the token after the text, if the tail picked it; else -1.
    The payload is the hidden states before the span, in the model's own format; none at the head.
    """

    request: SessionBytes
    span: Span
    model: ModelKey
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_RECOMPUTED)]
    text: TextRequest
    num_prompt: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    following: Annotated[int, Meta(ge=-1, le=MAX_TOKEN)] = -1


class Recomputed(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """Replica → coordinator: the result of a `Recompute`.

    The payload is the rows after the span.
    gaps: at the tail, for each position, by how much the logit of the token that follows in the text is below that of
    the target's pick, in thousandths.
    noise: the mean error of rows that the replica computed a second time in small pieces, in millionths.
    error: why nothing was computed, or empty.
    """

    request: SessionBytes
    gaps: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_GAP)], ...], Meta(max_length=MAX_RECOMPUTED)] = ()
    noise: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
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
    | OpenDrafts
    | AskDraft
    | Drafted
    | EndDrafts
    | AskHint
    | Hint
    | Rekey
)
