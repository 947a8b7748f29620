"""Decides which layers this peer serves: those that help most at first, later those that close a gap.

Also announces a new record when the duration of the peer's passes changes.
"""

import logging

import msgspec
import trio

from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.models.cache import CacheBudget
from dsd_p2p.models.open import OpenSpan
from dsd_p2p.peers.membership import Load, Membership
from dsd_p2p.placement.span import choose_move, choose_span
from dsd_p2p.placement.view import PeerView
from dsd_p2p.stage.server import StageServer
from dsd_p2p.types import Span
from dsd_p2p.wire.membership import MemberState
from node.local.events import Loading, Ready
from node.local.stage_models import load_span
from node.member.settings import PeerSettings

logger = logging.getLogger(__name__)

_GAP_BEATS = 2.0
"""Heartbeats to wait before closing a gap: a younger one may only be a restart."""

_MEASURE_S = 10.0
_REPORT_CHANGE = 1.25
"""Factor by which pass times must grow or shrink to justify a new record. Less is the noise of a shared machine."""


class Placed:
    """The layers of one peer. state: the state that it announces to the swarm."""

    def __init__(self, settings: PeerSettings, server: StageServer) -> None:
        self.state = MemberState.JOINING
        self._settings = settings
        self._profile = settings.profile
        self._server = server
        self._model: OpenSpan | None = None

    def load(self) -> Load:
        """Return the current load of our stage: number of sessions and bytes of cache."""
        cache_bytes = self._model.budget.used_bytes - self._server.parked_bytes if self._model else 0
        return Load(num_sessions=self._server.num_sessions, cache_bytes=cache_bytes)

    def budget(self) -> CacheBudget | None:
        """Return the cache memory that sessions share; None while no layers are loaded."""
        return self._model.budget if self._model else None

    async def take_first(self, membership: Membership, directory: SwarmDirectory) -> None:
        """Load and serve the layers that help the swarm most.

        Raises:
            ModelError: the layers cannot be loaded.
        """
        me = PeerView(
            peer=membership.registry.me,
            max_layers=self._profile.max_layers,
            layer_s=self._profile.layer_us / 1e6,
            layer16_s=self._profile.layer16_us / 1e6,
        )
        await self._take(choose_span(directory.view(with_joining=True), me), membership)

    async def serve_none(self, membership: Membership) -> None:
        """Serve without layers, as a member that only drafts."""
        self.state = MemberState.SERVING
        await membership.announce(membership.links.me, MemberState.SERVING, self._profile)
        self._settings.report(Ready(address=membership.links.me.addresses[0], span="none", weight_bytes=0))

    async def keep(self, membership: Membership, directory: SwarmDirectory) -> None:
        """Move to layers that no peer serves when the placement rule picks us, until cancelled."""
        interval_s = membership.registry.interval_s
        while True:
            with trio.move_on_after(2 * interval_s):
                await membership.changed()
            if not directory.view(with_joining=True).uncovered():
                continue
            await trio.sleep(_GAP_BEATS * interval_s)
            move = await trio.to_thread.run_sync(choose_move, directory.view(with_joining=True))
            if move is not None and move.peer == membership.registry.me and self._model is not None:
                logger.warning("gap found, moving from=%s to=%s", self._model.span, move.span)
                await self._take(move.span, membership)

    async def report_changes(self, membership: Membership) -> None:
        """Announce a new record whenever the duration of passes changes, until cancelled."""
        while True:
            await trio.sleep(_MEASURE_S)
            measured = self._server.measured_layer_s()
            if measured is None:
                continue
            layer_us, layer16_us = (max(1, round(seconds * 1e6)) for seconds in measured)
            ratio = layer16_us / max(1, self._profile.layer16_us)
            if not 1 / _REPORT_CHANGE < ratio < _REPORT_CHANGE:
                self._profile = msgspec.structs.replace(self._profile, layer_us=layer_us, layer16_us=layer16_us)
                await membership.announce(membership.links.me, self.state, self._profile)

    async def tell_drafter(self, membership: Membership, name: str, step_s: float) -> None:
        """Announce the drafter that this peer uses now, and the seconds of one of its steps."""
        self._profile = msgspec.structs.replace(self._profile, drafter=name, draft_us=round(step_s * 1e6))
        await membership.announce(membership.links.me, self.state, self._profile)

    async def drain(self, membership: Membership, timeout_s: float) -> None:
        """Refuse new sessions, give running ones `timeout_s` to finish, then leave. Do nothing if already draining."""
        if self.state is MemberState.DRAINING:
            return
        self.state = MemberState.DRAINING
        await membership.announce(membership.links.me, MemberState.DRAINING)
        await self._server.drain(timeout_s)
        await membership.leave()

    async def _take(self, span: Span, membership: Membership) -> None:
        """Load a span, reusing the layers that are already loaded, and serve it."""
        settings, addresses = self._settings, membership.links.me.addresses
        info = settings.describe(span, addresses)
        if self._model is None:
            # Announce the span before it is loaded, so that no other peer takes the same gap.
            await membership.announce(info, MemberState.JOINING)
        settings.report(Loading(what=f"load {settings.stored.model} {span}"))
        model = await trio.to_thread.run_sync(self._load, span)
        membership.links.me = info
        await self._server.serve_span(settings.machine.serve(model))
        self._model = model
        self.state = MemberState.SERVING
        await membership.announce(info, MemberState.SERVING)
        logger.info("serving span=%s", span)
        settings.report(Ready(address=addresses[0], span=str(span), weight_bytes=model.weight_bytes))

    def _load(self, span: Span) -> OpenSpan:
        settings = self._settings
        return load_span(settings.source, span, settings.config, settings.stored.dtype, donor=self._model)
