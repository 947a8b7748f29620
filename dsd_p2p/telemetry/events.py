"""Defines version 1 of the telemetry events: small structs, as JSON on the wire and one per line in a recording.

See docs/telemetry.md. Every field has a default, so that a reader copes with fields that an older or newer writer
leaves out or adds. Counts are totals since the session or the peer began, so that a missing event costs detail but no
sum is wrong.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

SCHEMA = 1

Label = Annotated[str, Meta(max_length=256)]
Sentence = Annotated[str, Meta(max_length=1024)]
Time = Annotated[float, Meta(ge=0, le=1e11)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Counts = Annotated[tuple[Count, ...], Meta(max_length=256)]


class StageOf(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of a route: the peer and its layers `[first, last)`."""

    peer: Label = ""
    first: Count = 0
    last: Count = 0


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="peer"):
    """The state of a peer, sent about once a second; the broker keeps the newest.

    at_s: by the writer's clock, as in every event. busy_share: busy share of the last interval, 0 to 1. queue: waiting
    windows. links_s: round trips to other peers. num_dropped: events that this peer had to drop.
    """

    at_s: Time = 0.0
    peer: Label = ""
    is_online: bool = True
    roles: Annotated[tuple[Label, ...], Meta(max_length=8)] = ()
    version: Label = ""
    model: Label = ""
    dtype: Label = ""
    first: Count = 0
    last: Count = 0
    num_layers: Count = 0
    state: Label = ""
    num_sessions: Count = 0
    queue: Count = 0
    busy_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    cache_bytes: Count = 0
    max_cache_bytes: Count = 0
    num_passes: Count = 0
    num_windows: Count = 0
    links_s: Annotated[dict[Label, Seconds], Meta(max_length=64)] = {}
    num_dropped: Count = 0


class SessionStarted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="session_started"):
    """A request opened its first route."""

    at_s: Time = 0.0
    session: Label = ""
    coordinator: Label = ""
    stages: Annotated[tuple[StageOf, ...], Meta(max_length=64)] = ()
    num_prompt_tokens: Count = 0
    max_tokens: Count = 0
    drafter: Label = ""
    verification: Label = ""


class Replayed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="replay"):
    """A request lost its route and continues over another."""

    at_s: Time = 0.0
    session: Label = ""
    coordinator: Label = ""
    stages: Annotated[tuple[StageOf, ...], Meta(max_length=64)] = ()
    num_tokens: Count = 0


class WindowVerified(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="window"):
    """A verdict arrived; not every verdict makes an event. Counts are totals of the session.

    drafter: who drafts now, because drafting can move. reason: the policy's, for its decision. traversal_s: from sending
    to the verdict. stage_us: each stage's computing time. hits_by_depth, outcomes_by_depth: see
    `dsd_p2p.session.request.RequestStats`.
    """

    at_s: Time = 0.0
    session: Label = ""
    coordinator: Label = ""
    mode: Label = ""
    drafter: Label = ""
    decision: Label = ""
    reason: Sentence = ""
    num_tokens: Count = 0
    num_windows: Count = 0
    num_nodes: Count = 0
    num_misses: Count = 0
    num_stale: Count = 0
    num_relaxed: Count = 0
    num_in_flight: Count = 0
    traversal_s: Seconds = 0.0
    stage_us: Counts = ()
    hits_by_depth: Counts = ()
    outcomes_by_depth: Counts = ()


class RateOf(msgspec.Struct, frozen=True, kw_only=True):
    """The measured rate of one kind of window (`Decision.kind`), and the tokens that it wrote in all."""

    kind: Label = ""
    tokens_per_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    num_tokens: Count = 0


class DecisionMade(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="decision"):
    """The policy changed its decision, or the request ended.

    Recordings of this event train the policy (`scripts/train_policy --live`). decision: its kind. features: what the
    policy saw, by `dsd_p2p.window.learned.features.NAMES`. measured: rates per kind of window so far.
    """

    at_s: Time = 0.0
    session: Label = ""
    coordinator: Label = ""
    decision: Label = ""
    reason: Sentence = ""
    features: Annotated[tuple[float, ...], Meta(max_length=256)] = ()
    measured: Annotated[tuple[RateOf, ...], Meta(max_length=64)] = ()


class SessionEnded(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="session_ended"):
    """A request ended. error: empty if it ended normally."""

    at_s: Time = 0.0
    session: Label = ""
    coordinator: Label = ""
    reason: Label = ""
    error: Sentence = ""
    num_tokens: Count = 0
    ttft_s: Seconds = 0.0
    total_s: Seconds = 0.0
    num_replays: Count = 0


Event = PeerStatus | SessionStarted | Replayed | WindowVerified | DecisionMade | SessionEnded


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """An event with the version of its schema."""

    event: Event
    schema: int = SCHEMA


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)


def encode_event(event: Event) -> bytes:
    """Return the event as one JSON object, without a newline."""
    return _encoder.encode(Envelope(event=event))


def decode_event(data: bytes) -> Event | None:
    """Return the event; None for anything that is not an event of this version, such as newer kinds."""
    try:
        envelope = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return envelope.event if envelope.schema == SCHEMA else None


def arrived(event: Event, now_s: float) -> Event:
    """Return a live event with its time set by our own clock, because other machines' clocks differ."""
    return msgspec.structs.replace(event, at_s=now_s)


def read_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Yield the events of a recording; skip lines that are not events."""
    for line in lines:
        if (event := decode_event(line)) is not None:
            yield event
