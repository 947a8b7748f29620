"""Opens and closes a request's session on a route, and tracks what its stages hold.

Follows docs/protocol.md, rule 2: Opening; rule 9: Replay; rule 10: Closing; rule 11: Parking.
"""

from dataclasses import dataclass

from dsd_p2p.errors import DsdError, PeerError, RemoteProtocolError
from dsd_p2p.session.request import NODE_S, Request, Route
from dsd_p2p.types import PeerId
from dsd_p2p.wire.messages import BASE, MAX_IDLE_S, CloseSession, OpenSession, Park


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A node that the text has gone past, and the position of its token."""

    epoch: int
    node: int
    position: int


class Opening:
    """The present route and what its stages are known to hold.

    prefix: the beginning of the prompt that they are believed to have parked. parked: the text that they must park.
    passed: the last node that the text went past. epoch: the epoch in which the session was last opened.
    """

    def __init__(self, request: Request, route: Route) -> None:
        self._request = request
        self.route = route
        self.prefix = request.prefix
        self.parked: Park | None = None
        self.passed: Passed | None = None
        self.epoch = 0
        self._loss: DsdError | None = None
        self._gone: set[str] = set()
        self._num_failed = 0

    def __repr__(self) -> str:
        stages = " → ".join(f"{hop.peer}{hop.span}" for hop in self.route.hops)
        return f"{stages}, opened in epoch {self.epoch}, {self._num_failed} failed attempts"

    def gone(self, peer: PeerId) -> None:
        """Note that the connection to a stage is lost; even if it comes back, it no longer holds the session."""
        self._gone.add(peer)

    def progressed(self) -> None:
        """Note that tokens were committed, and count failed attempts from 0 again."""
        self._num_failed = 0

    def failed(self, error: DsdError) -> int | None:
        """Count a failed attempt; return how many failed before it, or None if no further attempt is allowed."""
        if self._num_failed >= self._request.retry.max_attempts:
            return None
        self._num_failed += 1
        self._loss = error
        return self._num_failed - 1

    @property
    def is_loss_final(self) -> bool:
        """True when other stages would not help: no room, a broken model, or a broken protocol."""
        loss = self._loss
        return loss is not None and (not isinstance(loss, PeerError) or isinstance(loss, RemoteProtocolError))

    @property
    def loss(self) -> DsdError | None:
        """The error of the last failed attempt."""
        return self._loss

    def go_over(self, route: Route, num_tokens: int) -> tuple[tuple[bool, ...], list[PeerId]]:
        """Switch to another route; return which of its stages are kept, and the peers that are no longer on it.

        num_tokens: length of the text. An empty tuple means that no stage is kept: the whole text is sent again.
        """
        kept = self._kept(route, num_tokens)
        in_new = {hop.peer for hop in route.hops}
        left_out = [PeerId(hop.peer) for hop in self.route.hops if hop.peer not in in_new]
        self.route, self.prefix = route, None
        self._gone.clear()
        return kept, left_out

    def _kept(self, route: Route, num_tokens: int) -> tuple[bool, ...]:
        is_sound = isinstance(self._loss, PeerError) and not isinstance(self._loss, RemoteProtocolError)
        # Nobody could check the passes over a refill, so an attested session keeps no stage.
        if not is_sound or self._request.attest or self._num_failed > 1:
            return ()
        if self.passed is None or self.passed.position != num_tokens - 2:
            return ()
        held = {(hop.peer, hop.span) for hop in self.route.hops if hop.peer not in self._gone}
        kept = tuple((hop.peer, hop.span) in held for hop in route.hops)
        return kept if any(kept) else ()

    def open_message(self, epoch: int, num_given: int, kept: tuple[bool, ...]) -> OpenSession:
        """Return the message that opens the session in `epoch`."""
        request, route, passed = self._request, self.route, self.passed
        self.epoch = epoch
        return OpenSession(
            session=request.session,
            epoch=epoch,
            route=route.hops,
            coordinator=request.coordinator,
            model=route.model,
            text=request.text,
            num_prompt=request.num_prompt,
            num_given=num_given,
            idle_timeout_s=min(MAX_IDLE_S, 2 * request.stall_timeout_s + NODE_S * num_given),
            formats=request.hidden_formats if len(route.hops) > 1 else (),
            kept=kept,
            resume=(passed.epoch, passed.node) if kept and passed is not None else (0, BASE),
            attest=request.attest,
            prefix=self.prefix,
        )

    def park_text(self) -> None:
        """Make the close message ask the stages to park the text, if the request wants that."""
        if self._request.is_parked and self.passed is not None:
            at = (self.passed.epoch, self.passed.node)
            self.parked = Park(at=at, num_tokens=self.passed.position + 1)

    def close_message(self, epoch: int) -> CloseSession:
        """Return the message that ends the session at a stage."""
        return CloseSession(session=self._request.session, epoch=max(epoch, 0), park=self.parked)
