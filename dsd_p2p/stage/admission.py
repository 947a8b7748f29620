"""Decides whether a stage takes a message, from the message and from what is open here.

Follows docs/protocol.md, rule 2: Opening; rule 5: Idempotence.
Nothing here waits, allocates cache or changes a session.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from dsd_p2p.errors import CapacityError, PeerDisconnected, RemoteProtocolError
from dsd_p2p.peers.links import Arrived
from dsd_p2p.stage.parking import PARKED_S
from dsd_p2p.stage.session import StageSession
from dsd_p2p.types import PeerId, PeerInfo, check_same_model
from dsd_p2p.wire.messages import OpenSession, Window

_MAX_CLOSED_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """What one stage grants.

    max_sessions: open at the same time. max_sessions_per_peer: of one coordinator.
    max_queued_windows, max_queued_bytes: of one session, waiting for the model.
    max_draft_slots: cache slots of one session beyond its longest text, and its most speculative nodes.
    max_boundary_bytes: of the hidden states that all sessions together keep to refill a neighbour.
    dials_routes: connect to the next stage by the address in the route; in a swarm, only members that are connected are sent to.
    orphan_s: what a session holds waits this long for another route after a neighbour was lost.
    max_parked: texts of closed sessions, as long as nobody needs their room. parked_s: how long they are held at most.
    """

    max_sessions: int = 64
    max_sessions_per_peer: int = 16
    max_queued_windows: int = 512
    max_queued_bytes: int = 256 << 20
    max_draft_slots: int = 1024
    max_boundary_bytes: int = 256 << 20
    dials_routes: bool = True
    orphan_s: float = 15.0
    max_parked: int = 256
    parked_s: float = PARKED_S


class ClosedSessions:
    """The sessions that ended lately: a close can overtake the open that travels down the route."""

    def __init__(self) -> None:
        self._epochs: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    def add(self, coordinator: str, name: bytes, epoch: int) -> None:
        """Remember that openings up to this epoch are to be ignored."""
        key = (coordinator, name)
        self._epochs[key] = max(epoch, self._epochs.get(key, -1))
        self._epochs.move_to_end(key)
        while len(self._epochs) > _MAX_CLOSED_REMEMBERED:
            self._epochs.popitem(last=False)

    def is_closed(self, opened: OpenSession) -> bool:
        """True when the coordinator has closed this opening already."""
        return opened.epoch <= self._epochs.get((opened.coordinator.peer, opened.session), -1)


def index_in_route(opened: OpenSession, me: str, sender: PeerId) -> int:
    """Return our index in the route; the sender must stand before us there.

    Raises:
        RemoteProtocolError: it does not, or we are not in the route once.
    """
    mine = [index for index, hop in enumerate(opened.route) if hop.peer == me]
    if len(mine) != 1:
        raise RemoteProtocolError("route", [hop.peer for hop in opened.route], f"{me} exactly once")
    before = opened.route[mine[0] - 1].peer if mine[0] else opened.coordinator.peer
    if sender != before:
        raise RemoteProtocolError("sender", sender, f"{before}, the stage before in the route")
    return mine[0]


def check_opening(opened: OpenSession, index: int, me: PeerInfo) -> None:
    """Compare what is asked with what we serve.

    Raises:
        RemoteProtocolError: the route, the span or the numbers cannot be.
        ModelError: another model is asked for. CapacityError: a longer text than the model takes.
        PeerDisconnected: we hold no layers now.
    """
    if me.span is None:
        raise PeerDisconnected("this peer holds no layers now: choose another")
    _check_route(opened, index, me)
    _check_given(opened)
    check_same_model(me.model, opened.model)
    if opened.max_length > me.max_positions:
        raise CapacityError(f"{opened.max_length} tokens exceed the model's {me.max_positions}: ask for fewer")


def _check_route(opened: OpenSession, index: int, me: PeerInfo) -> None:
    route, span = opened.route, opened.route[index].span
    if len({hop.peer for hop in route}) != len(route):
        raise RemoteProtocolError("route", [hop.peer for hop in route], "each peer once")
    if me.span is None or not me.span.first <= span.first < span.last <= me.span.last:
        raise RemoteProtocolError("span", str(span), f"inside this stage's {me.span}")
    bounds = [0, *(hop.span.last for hop in route)]
    if [hop.span.first for hop in route] != bounds[:-1] or bounds[-1] != me.num_layers:
        raise RemoteProtocolError("route spans", [str(hop.span) for hop in route], f"layers 0..{me.num_layers}")


def _check_given(opened: OpenSession) -> None:
    if not opened.num_prompt <= opened.num_given <= opened.max_length:
        limit = f"{opened.num_prompt} to {opened.max_length}, the prompt's and the text's length"
        raise RemoteProtocolError("num_given", opened.num_given, limit)
    if (prefix := opened.prefix) is None:
        return
    if prefix.num_tokens >= opened.num_given or any(opened.kept) or opened.attest:
        limit = f"below {opened.num_given}, nothing kept or attested"
        raise RemoteProtocolError("prefix", prefix.num_tokens, limit)
    if prefix.num_tokens > opened.num_prompt:
        raise RemoteProtocolError("prefix", prefix.num_tokens, f"at most the {opened.num_prompt} of the prompt")


def replaced_session(
    opened: OpenSession, index: int, sessions: Mapping[bytes, StageSession], limits: StageLimits, *, is_draining: bool
) -> StageSession | None:
    """Return the session of this name that a new one takes the place of, having checked that there is room.

    Raises:
        RemoteProtocolError: the name is another coordinator's, or the epoch is not above the open one's.
        CapacityError: too many are open. PeerDisconnected: we are shutting down, or hold nothing that could be gone on with.
    """
    old = sessions.get(opened.session)
    if old is not None:
        if old.coordinator != opened.coordinator.peer or opened.epoch <= old.opened.epoch:
            raise RemoteProtocolError("epoch", opened.epoch, f"above {old.opened.epoch}, from the same coordinator")
    elif is_draining:
        raise PeerDisconnected("this stage is shutting down: choose another")
    elif len(sessions) >= limits.max_sessions:
        raise CapacityError(f"{limits.max_sessions} sessions are open here: try again later")
    else:
        num_theirs = sum(each.coordinator == opened.coordinator.peer for each in sessions.values())
        if num_theirs >= limits.max_sessions_per_peer:
            raise CapacityError(f"{num_theirs} of your sessions are open here already: end one, or try later")
    if opened.kept and opened.kept[index] and (old is None or not _holds(old, opened.route[index].peer, opened)):
        raise PeerDisconnected("nothing of this session is kept here: send all of it again")
    return old


def _holds(old: StageSession, me: str, opened: OpenSession) -> bool:
    """True when the old session has a cache, of the very layers that are asked for now."""
    span = next(hop.span for hop in opened.route if hop.peer == me)
    return old.held.cache is not None and old.place.span == span


def is_window_wanted(session: StageSession, event: Arrived, window: Window) -> bool:
    """Return whether a window is to be computed; False for what is out of date.

    Raises:
        RemoteProtocolError: it comes from elsewhere than the stage before us, or claims what it cannot know.
    """
    place = session.place
    if session.is_orphan or session.held.state.is_stale(window):
        return False
    if event.sender != place.previous:
        if window.epoch < place.opened.epoch:
            return False
        raise RemoteProtocolError("sender", event.sender, f"{place.previous}, the stage before in the route")
    if place.model.is_head and (window.costs or window.link_bytes or window.waited):
        measured = (window.costs, window.link_bytes, window.waited)
        raise RemoteProtocolError("costs, link_bytes, waited", measured, "none before the head")
    expected_bytes = 0 if place.model.is_head else len(window.tokens) * place.read_row_bytes
    if len(event.payload) != expected_bytes:
        raise RemoteProtocolError("payload length", len(event.payload), f"{expected_bytes} bytes")
    return True
