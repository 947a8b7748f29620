"""Decides whether a stage accepts a message, given the message and the open sessions.

Follows docs/protocol.md, rule 2: Opening; rule 5: Idempotence.
No function here waits, allocates cache or changes a session.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from dsd_p2p.errors import CapacityError, PeerDisconnected, PeerLeaving, RemoteProtocolError
from dsd_p2p.peers.links import Arrived
from dsd_p2p.peers.scopes import RootOf, Scopes
from dsd_p2p.stage.parking import PARKED_S
from dsd_p2p.stage.session import StageSession
from dsd_p2p.types import PeerId, PeerInfo, check_same_model
from dsd_p2p.wire.messages import MAX_REVEALED, MAX_REVEALED_BYTES, OpenSession, Reveal, Window

_MAX_CLOSED_REMEMBERED = 1024
_MAX_TIMES_REVEALED = 2
"""An auditor keeps what it was shown, so it asks for each row once."""


SESSIONS = Scopes(what="sessions", node=64, root=32, peer=16)
UNBOUNDED_CACHE = Scopes(what="bytes of cache", node=1 << 62, root=1 << 62, peer=1 << 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """The limits of one stage.

    sessions: open at the same time, by coordinator. cache_bytes: what they take of the cache.
    max_queued_windows, max_queued_bytes: windows of one session that wait for the model.
    max_draft_slots: cache slots of one session beyond its longest text; also the most nodes that may wait below its
    root.
    max_boundary_bytes: hidden states that all sessions together keep to refill a neighbour.
    dials_routes: dial the next stage at the address in the route; if False (in a swarm), use only open connections.
    orphan_s: how long a session waits for another route after a neighbour was lost.
    first_window_s: how long a session waits for its first window, for each stage of the route up to this one. It holds
    cache from the start.
    max_parked: texts of closed sessions to park while nobody needs the room. parked_s: the longest time to park one.
    """

    sessions: Scopes = SESSIONS
    cache_bytes: Scopes = UNBOUNDED_CACHE
    max_queued_windows: int = 512
    max_queued_bytes: int = 256 << 20
    max_draft_slots: int = 1024
    max_boundary_bytes: int = 256 << 20
    dials_routes: bool = True
    orphan_s: float = 15.0
    first_window_s: float = 30.0
    max_parked: int = 256
    parked_s: float = PARKED_S


class ClosedSessions:
    """A memory of recently ended sessions, because a close can overtake its opening on the way down the route."""

    def __init__(self) -> None:
        self._epochs: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    def add(self, coordinator: str, name: bytes, epoch: int) -> None:
        """Remember to ignore openings up to this epoch."""
        key = (coordinator, name)
        self._epochs[key] = max(epoch, self._epochs.get(key, -1))
        self._epochs.move_to_end(key)
        while len(self._epochs) > _MAX_CLOSED_REMEMBERED:
            self._epochs.popitem(last=False)

    def is_closed(self, opened: OpenSession) -> bool:
        """Return whether the session was already closed at this epoch or a later one."""
        return opened.epoch <= self._epochs.get((opened.coordinator.peer, opened.session), -1)


def index_in_route(opened: OpenSession, me: str, sender: PeerId) -> int:
    """Return our index in the route, and check that the sender is directly before us.

    Raises:
        RemoteProtocolError: it is not, or the route does not contain us exactly once.
    """
    mine = [index for index, hop in enumerate(opened.route) if hop.peer == me]
    if len(mine) != 1:
        raise RemoteProtocolError("route", [hop.peer for hop in opened.route], f"a route with {me} exactly once")
    before = opened.route[mine[0] - 1].peer if mine[0] else opened.coordinator.peer
    if sender != before:
        raise RemoteProtocolError("sender", sender, f"{before}, which is before us in the route")
    return mine[0]


def check_opening(opened: OpenSession, index: int, me: PeerInfo) -> None:
    """Check that we can serve what an opening asks for.

    Raises:
        RemoteProtocolError: the route, the span or the numbers are invalid.
        ModelError: the opening asks for another model.
        CapacityError: the text can become longer than the model allows.
        PeerDisconnected: we hold no layers now.
    """
    if me.span is None:
        raise PeerDisconnected("this peer holds no layers now: choose another")
    _check_route(opened, index, me)
    _check_given(opened)
    check_same_model(me.model, opened.model)
    if opened.max_length > me.max_positions:
        raise CapacityError(f"{opened.max_length} tokens exceed the model's limit of {me.max_positions}: ask for fewer")


def _check_route(opened: OpenSession, index: int, me: PeerInfo) -> None:
    route, span = opened.route, opened.route[index].span
    if len({hop.peer for hop in route}) != len(route):
        raise RemoteProtocolError("route", [hop.peer for hop in route], "each peer at most once")
    if me.span is None or not me.span.first <= span.first < span.last <= me.span.last:
        raise RemoteProtocolError("span", str(span), f"inside this stage's {me.span}")
    bounds = [0, *(hop.span.last for hop in route)]
    if [hop.span.first for hop in route] != bounds[:-1] or bounds[-1] != me.num_layers:
        raise RemoteProtocolError(
            "route spans",
            [str(hop.span) for hop in route],
            f"spans that cover layers [0, {me.num_layers}) without gaps",
        )


def _check_given(opened: OpenSession) -> None:
    if not opened.num_prompt <= opened.num_given <= opened.max_length:
        limit = f"{opened.num_prompt} (the prompt) to {opened.max_length} (the whole text)"
        raise RemoteProtocolError("num_given", opened.num_given, limit)
    if (prefix := opened.prefix) is None:
        return
    if prefix.num_tokens >= opened.num_given or any(opened.kept) or opened.attest:
        limit = f"fewer than the {opened.num_given} given tokens, and neither kept stages nor attestations"
        raise RemoteProtocolError("prefix", prefix.num_tokens, limit)
    if prefix.num_tokens > opened.num_prompt:
        raise RemoteProtocolError("prefix", prefix.num_tokens, f"at most the {opened.num_prompt} tokens of the prompt")


def replaced_session(
    opened: OpenSession,
    index: int,
    sessions: Mapping[bytes, StageSession],
    scopes: Scopes,
    root_of: RootOf,
    *,
    is_draining: bool,
) -> StageSession | None:
    """Return the session that the new one replaces, or None; check that there is room for a new one.

    Raises:
        RemoteProtocolError: the session belongs to another coordinator, or the epoch is not above the open one's.
        CapacityError: too many sessions are open.
        PeerLeaving: we are shutting down.
        PeerDisconnected: we do not hold what the opening wants us to keep.
    """
    old = sessions.get(opened.session)
    if old is not None:
        if old.coordinator != opened.coordinator.peer or opened.epoch <= old.opened.epoch:
            raise RemoteProtocolError("epoch", opened.epoch, f"above {old.opened.epoch}, from the same coordinator")
    elif is_draining:
        raise PeerLeaving("this stage is shutting down: choose another")
    else:
        held = ((each.coordinator, 1) for each in sessions.values())
        scopes.check(held, PeerId(opened.coordinator.peer), 1, root_of)
    if opened.kept and opened.kept[index] and (old is None or not _holds(old, opened.route[index].peer, opened)):
        raise PeerDisconnected("this stage holds nothing of the session: send the whole text again")
    return old


def _holds(old: StageSession, me: str, opened: OpenSession) -> bool:
    """Return whether the old session has a cache of exactly the layers that the opening asks for."""
    span = next(hop.span for hop in opened.route if hop.peer == me)
    return old.held.cache is not None and old.place.span == span


def check_reveal(session: StageSession, reveal: Reveal) -> None:
    """Check a question for rows, and count them.

    Raises:
        RemoteProtocolError: the session is not audited, the rows are too many for one answer, or it has been asked for
            them again and again.
    """
    if not session.opened.attest:
        raise RemoteProtocolError("session", reveal.session.hex(), "one that was opened with attest")
    if not reveal.start < reveal.end <= reveal.start + MAX_REVEALED:
        raise RemoteProtocolError("end", reveal.end, f"1 to {MAX_REVEALED} above start, {reveal.start}")
    if (num_bytes := (reveal.end - reveal.start) * session.place.written_row_bytes) > MAX_REVEALED_BYTES:
        raise RemoteProtocolError("rows", f"{num_bytes} bytes of them", f"at most {MAX_REVEALED_BYTES} in one answer")
    session.num_revealed += reveal.end - reveal.start
    limit = _MAX_TIMES_REVEALED * session.opened.max_length + MAX_REVEALED
    if session.num_revealed > limit:
        raise RemoteProtocolError("rows asked for", session.num_revealed, f"at most {limit}")


def is_window_wanted(session: StageSession, event: Arrived, window: Window) -> bool:
    """Return whether to compute a window; False if it is stale.

    Raises:
        RemoteProtocolError: the sender is not the stage before us, the window has measurements before the head, or the
            payload has the wrong length.
    """
    place = session.place
    if session.is_orphan or session.held.state.is_stale(window):
        return False
    if event.sender != place.previous:
        if window.epoch < place.opened.epoch:
            return False
        raise RemoteProtocolError("sender", event.sender, f"{place.previous}, which is before us in the route")
    if place.model.is_head and (window.costs or window.link_bytes or window.waited):
        measured = (window.costs, window.link_bytes, window.waited)
        raise RemoteProtocolError("costs, link_bytes, waited", measured, "none before the head")
    expected_bytes = 0 if place.model.is_head else len(window.tokens) * place.read_row_bytes
    if len(event.payload) != expected_bytes:
        raise RemoteProtocolError("payload length", len(event.payload), f"{expected_bytes} bytes")
    return True
