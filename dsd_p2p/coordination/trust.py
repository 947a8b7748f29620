"""Makes the spot checks of audited requests, sends their questions, and avoids the peers that they caught lying."""

import logging
import random
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from dsd_p2p.coordination.audit import Auditor, witnesses
from dsd_p2p.coordination.checking import SpotChecks
from dsd_p2p.coordination.directory import NO_DETOUR, OURSELVES, Directory, Replica
from dsd_p2p.errors import AuditIncomplete, DishonestPeer, PeerTimeout
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.request import Request, Route
from dsd_p2p.types import PeerId, Span, short_peer
from dsd_p2p.wire.messages import Recompute, Recomputed, Reveal, Revealed

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 15.0
"""Long enough for a check of the longest text, which takes a second or two to recompute.

Waiting half a minute for a silent peer would stall the answer.
"""

_DISTRUST_S = 3600.0
"""How long a peer that was caught lying is avoided.

An hour is longer than any answer, and short enough that a repaired machine is used again without further action.
"""


class Trust:
    """The peers that one coordinator distrusts. distrusted: until when to avoid each caught peer, seconds."""

    def __init__(self, links: PeerLinks, directory: Directory) -> None:
        self._links = links
        self._directory = directory
        self._asked: dict[tuple[PeerId, bytes], trio.MemorySendChannel[Arrived]] = {}
        self.distrusted: dict[str, float] = {}

    def avoid(self, detour: Detour) -> Detour:
        """Return the detour extended by the peers that were caught lying."""
        return replace(detour, peers=detour.peers | self._liars())

    def checks_of(self, request: Request) -> SpotChecks:
        """Return the spot checks of an audited request."""
        rng = random.Random(secrets.randbits(64))  # noqa: S311 - only the seed must be unpredictable
        auditor = Auditor(
            session=request.session,
            num_prompt=request.num_prompt,
            text=request.text,
            replicas=self._trusted_replicas,
            root_of=self._directory.root_of,
            ask=self._ask,
            shuffle=rng.shuffle,
        )
        return SpotChecks(auditor, self._distrust)

    async def hear(self, event: Arrived, message: Revealed | Recomputed) -> None:
        """Hand an answer to the check that waits for it; drop an answer that no check waits for."""
        name = message.session if isinstance(message, Revealed) else message.request
        if (waiting := self._asked.get((event.sender, name))) is not None:
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                waiting.send_nowait(replace(event, payload=memoryview(bytes(event.payload))))

    def _liars(self) -> frozenset[str]:
        now_s = trio.current_time()
        return frozenset(peer for peer, until_s in self.distrusted.items() if until_s > now_s)

    def check_route(self, route: Route) -> None:
        """Check that each stage of an audited route can be checked.

        Raises:
            AuditIncomplete: there is no replica for one of them.
        """
        for hop in route.hops:
            is_ours = self._directory.root_of(hop.peer) == OURSELVES
            if not is_ours and not witnesses(self._trusted_replicas, self._directory.root_of, hop):
                raise AuditIncomplete(
                    f"nobody can check layers {hop.span} of peer {short_peer(hop.peer)}: an audit needs a second peer with "
                    "these layers that came with another invite"
                )

    def _trusted_replicas(self, span: Span, but: str) -> Sequence[Replica]:
        liars = self.avoid(NO_DETOUR).peers
        return [replica for replica in self._directory.replicas(span, but) if replica.peer not in liars]

    async def _ask(self, peer: PeerId, message: Reveal | Recompute, payload: bytes) -> Arrived:
        """Send a question to a peer and return its answer.

        Raises:
            PeerTimeout, PeerDisconnected: no answer came.
        """
        name = (peer, message.session if isinstance(message, Reveal) else message.request)
        self._asked[name], answers = trio.open_memory_channel[Arrived](1)
        try:
            with trio.fail_after(_ASK_TIMEOUT_S):
                await self._links.send(peer, message, payload)
                return await answers.receive()
        except trio.TooSlowError:
            raise PeerTimeout(f"no answer within {_ASK_TIMEOUT_S:g} s") from None
        finally:
            del self._asked[name]

    def _distrust(self, error: DishonestPeer) -> None:
        logger.error("dishonest peer avoided peer=%s for_s=%.0f error=%s", error.peer, _DISTRUST_S, error)
        self.distrusted[error.peer] = trio.current_time() + _DISTRUST_S
