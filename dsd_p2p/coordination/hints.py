"""Shares what drafters did on a route: with later runs of this process, and with other members of the swarm.

How it works. A coordinator that measures a route for the first time begins with what an earlier run left in the file. If
there is nothing, it asks a few members how often the drafter was right there. Only this is taken from others: links and
costs differ from place to place, and the first verdict tells them. A member answers from what its own requests measured.
A wrong hint costs a little speed, because it counts less than own measurements; it never touches a token. A service of
`dsd_p2p.peers.services`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from dsd_p2p.coordination.experience_file import ExperienceFile
from dsd_p2p.errors import PeerError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.services import Handler
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import PeerId
from dsd_p2p.window.tracker import Calibration, Kept, Tracker
from dsd_p2p.wire.hints import AskHint, Hint, Hits
from dsd_p2p.wire.messages import Message

logger = logging.getLogger(__name__)

_MAX_ASKED = 3
_TIMEOUT_S = 2.0
_CHECK_S = 0.05
_SEND_TIMEOUT_S, _MAX_ANSWERING = 1.0, 16
_MAX_KNOWN = 64
_MAX_NAME, _MAX_RANKS = 16384, 64


class SharedExperience:
    """The experience of one process. peers: returns the members to ask, best first."""

    def __init__(self, path: Path, links: PeerLinks, peers: Callable[[], Sequence[PeerId]]) -> None:
        self._file = ExperienceFile(path)
        self._links = links
        self._peers = peers
        self._known: OrderedDict[str, Hits] = OrderedDict()
        self._waiting: dict[tuple[PeerId, int], Tracker] = {}
        self._next_number = 0
        self._known_lock = threading.Lock()
        self._nursery: trio.Nursery | None = None
        self._num_answering = 0

    def begin(self, name: tuple[str, ...], tracker: Tracker, nursery: trio.Nursery) -> None:
        """Let a new tracker begin with what is known; ask others in the background if that is nothing."""
        kept = self._file.of(name)
        if kept is not None:
            tracker.begin(kept)
        else:
            nursery.start_soon(self._ask, "\n".join(name), tracker)

    def keep(self, name: tuple[str, ...], kept: Kept) -> None:
        """Keep what a tracker measured."""
        if kept.num_outcomes:
            joined = "\n".join(name)
            # Requests that end at the same time keep in threads of their own.
            with self._known_lock:
                self._known.pop(joined, None)
                self._known[joined] = _hits_of(kept)
                while len(self._known) > _MAX_KNOWN:
                    self._known.popitem(last=False)
        self._file.keep(name, kept)

    async def _ask(self, name: str, tracker: Tracker) -> None:
        asked: list[tuple[PeerId, int]] = []
        if len(name) > _MAX_NAME:
            return
        try:
            with trio.move_on_after(_TIMEOUT_S):
                for peer in self._peers()[:_MAX_ASKED]:
                    self._next_number = (self._next_number + 1) % (1 << 31)
                    self._waiting[peer, self._next_number] = tracker
                    asked.append((peer, self._next_number))
                    with suppress(PeerError):
                        await self._links.send(peer, AskHint(number=self._next_number, name=name))
                # The first answer is taken, and the others are not waited for.
                while any(each in self._waiting for each in asked):  # noqa: ASYNC110 - a state
                    await trio.sleep(_CHECK_S)
        finally:
            for each in asked:
                self._waiting.pop(each, None)

    # The service

    def start(self, nursery: trio.Nursery) -> None:
        """Answer in the background as long as the nursery is open."""
        self._nursery = nursery

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of each message type."""
        return {AskHint: self._answer, Hint: self._hear}

    def lost(self, event: Lost) -> None:
        """Forget the questions to a peer that is gone."""
        for each in [each for each in self._waiting if each[0] == event.peer]:
            del self._waiting[each]

    async def _answer(self, event: Arrived, message: AskHint) -> None:
        # A peer that does not read must not hold up the messages of others.
        if self._nursery is not None and self._num_answering < _MAX_ANSWERING:
            hint = Hint(number=message.number, known=self._known.get(message.name))
            self._num_answering += 1
            self._nursery.start_soon(self._send, event.sender, hint)

    async def _send(self, peer: PeerId, hint: Hint) -> None:
        try:
            with suppress(PeerError), trio.move_on_after(_SEND_TIMEOUT_S):
                await self._links.send(peer, hint)
        finally:
            self._num_answering -= 1

    async def _hear(self, event: Arrived, message: Hint) -> None:
        tracker = self._waiting.pop((event.sender, message.number), None)
        if tracker is None or (known := message.known) is None:
            return
        logger.info("hint taken from=%s", event.sender)
        self._waiting = {asked: other for asked, other in self._waiting.items() if other is not tracker}
        tracker.calibrate(
            Calibration(
                confidence=known.confidence / 1000,
                exponent=known.exponent / 1000,
                hits=[each / 10 for each in known.hits],
                tries=[each / 10 for each in known.tries],
            )
        )


def _hits_of(kept: Kept) -> Hits:
    """Return what may help other coordinators, within the bounds of the message."""
    return Hits(
        confidence=round(1000 * max(0.0, min(1.0, kept.confidence))),
        exponent=round(1000 * max(0.1, min(10.0, kept.exponent))),
        hits=tuple(round(10 * max(0.0, min(1e4, each))) for each in kept.hits_by_rank[:_MAX_RANKS]),
        tries=tuple(round(10 * max(0.0, min(1e4, each))) for each in kept.tries_by_rank[:_MAX_RANKS]),
    )
