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
from dsd_p2p.errors import AuditIncomplete, DishonestPeer, LocalProtocolError, PeerDisconnected, PeerTimeout
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.placement.route import Detour
from dsd_p2p.session.request import Request, Route
from dsd_p2p.types import PeerId, Span, short_peer
from dsd_p2p.wire.messages import Recompute, Recomputed, Reveal, Revealed

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 15.0
_SLOWEST_BYTES_PER_S, _SLOWEST_TOKEN_S = 250e3, 0.02
"""What a peer may take on top, on a slow link and a slow machine. Waiting longer for a silent peer stalls the answer."""

_DOUBT_S = 60.0
"""How long a peer is avoided that did not show what it computed. That may have been the network."""

_DISTRUST_S = 3600.0
"""How long a peer that was caught lying is avoided.

An hour is longer than any answer, and short enough that a repaired machine is used again without further action.
"""


class Trust:
    """The peers that one coordinator distrusts. distrusted: until when to avoid each caught peer, seconds."""

    def __init__(self, links: PeerLinks, directory: Directory) -> None:
        self._links = links
        self._directory = directory
        self._asked: dict[tuple[PeerId, bool, bytes], trio.MemorySendChannel[Arrived]] = {}
        self._locks: dict[PeerId, trio.Lock] = {}
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
        is_reveal = isinstance(message, Revealed)
        name = message.session if isinstance(message, Revealed) else message.request
        if (waiting := self._asked.get((event.sender, is_reveal, name))) is not None:
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

    def lost(self, peer: PeerId) -> None:
        """End the questions to a peer that is gone."""
        for (asked, _, _), waiting in self._asked.items():
            if asked == peer:
                waiting.close()
        self._locks.pop(peer, None)

    async def _ask(self, peer: PeerId, message: Reveal | Recompute, payload: bytes) -> Arrived:
        """Send a question to a peer and return its answer. A peer is asked for one check at a time.

        Raises:
            PeerTimeout, PeerDisconnected: no answer came.
            AuditIncomplete: the question does not fit into a frame.
        """
        async with self._locks.setdefault(peer, trio.Lock()):
            return await self._ask_now(peer, message, payload)

    async def _ask_now(self, peer: PeerId, message: Reveal | Recompute, payload: bytes) -> Arrived:
        is_reveal = isinstance(message, Reveal)
        name = (peer, is_reveal, message.session if isinstance(message, Reveal) else message.request)
        num_tokens = 0 if isinstance(message, Reveal) else len(message.tokens)
        # The replica sends as much back, and computes it.
        timeout_s = _ASK_TIMEOUT_S + 2 * len(payload) / _SLOWEST_BYTES_PER_S + num_tokens * _SLOWEST_TOKEN_S
        self._asked[name], answers = trio.open_memory_channel[Arrived](1)
        try:
            with trio.fail_after(timeout_s):
                await self._links.send(peer, message, payload)
                return await answers.receive()
        except trio.TooSlowError:
            raise PeerTimeout(f"no answer within {timeout_s:.0f} s") from None
        except trio.EndOfChannel:
            raise PeerDisconnected(f"lost {short_peer(peer)} while it was asked") from None
        except LocalProtocolError as exc:
            raise AuditIncomplete(
                f"a check of this text does not fit into a frame ({exc}): ask for fewer tokens"
            ) from exc
        finally:
            del self._asked[name]

    def _distrust(self, error: DishonestPeer | AuditIncomplete) -> None:
        seconds = _DISTRUST_S if isinstance(error, DishonestPeer) else _DOUBT_S
        logger.error("peer avoided peer=%s for_s=%.0f error=%s", error.peer, seconds, error)
        until_s = trio.current_time() + seconds
        self.distrusted[error.peer] = max(until_s, self.distrusted.get(error.peer, 0.0))
