"""Follows the owner's choice of a drafter and tells the swarm what this peer drafts with."""

from collections.abc import Mapping

import trio

from dsd_p2p.coordination.draft_places import Offer
from dsd_p2p.coordination.own_drafter import OwnDrafter
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.peers.gatekeeper import Bell
from dsd_p2p.peers.membership import Membership
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.types import PeerId
from node.config.machine import available_bytes
from node.local.events import Loading
from node.member.placed import Placed
from node.member.settings import PeerSettings

_MEMORY_SHARE = 0.3
"""Share of the free memory that a drafter may take; the layers may take 0.6 (`.measure`)."""


class _ReportedProgress:
    """Passes what is loaded on as the peer's events, each once."""

    def __init__(self, settings: PeerSettings) -> None:
        self._settings = settings
        self._last = ""

    def step(self, what: str, done: int, total: int) -> None:
        """Report `what` if it is new."""
        if what != self._last:
            self._last = what
            self._settings.report(Loading(what=what))


class MemberDrafts:
    """The drafter of one peer. wanted: the name that its user or the owner chose; "none" if it does not coordinate."""

    def __init__(self, settings: PeerSettings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self.wanted = self._wanted_now()

    def choice(self) -> DrafterChoice | None:
        """Return the choice among the drafters that are wanted now, or None if this peer does not coordinate."""
        settings = self._settings
        if self.wanted == "none":
            return None
        return DrafterChoice(
            self.wanted,
            settings.source,
            model=settings.stored.model,
            device=settings.config.device,
            room_bytes=int(_MEMORY_SHARE * available_bytes()),
            progress=_ReportedProgress(settings),
        )

    def offers(self, directory: SwarmDirectory) -> Mapping[PeerId, Offer]:
        """Return what other members offer to draft with; nothing where prompt lookup was asked for by name."""
        return {} if self.wanted == LOOKUP.name else directory.draft_offers()

    async def follow(self, own: OwnDrafter, membership: Membership, placed: Placed) -> None:
        """Tell the swarm when another drafter is in use, and take the owner's later choices, until cancelled."""
        bell, told = Bell(), None
        own.changed = bell.ring
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_choices, own, membership)
            while True:
                in_use = own.current.name, own.step_s
                if in_use == told:
                    await bell.wait()
                else:
                    await placed.tell_drafter(membership, *in_use)
                    told = in_use

    def _wanted_now(self) -> str:
        """Return the drafter that this peer should use: its user's, or else the owner's."""
        return self._settings.config.draft or (self._registry.choice.draft if self._registry.choice else "auto")

    async def _take_choices(self, own: OwnDrafter, membership: Membership) -> None:
        while True:
            wanted = self._wanted_now()
            if wanted != self.wanted:
                self.wanted = wanted
                choice = self.choice()
                if choice is not None:
                    own.choose(choice)
            await membership.changed()
