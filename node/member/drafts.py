"""Follows the owner's choice of a drafter and tells the swarm what this peer drafts with."""

from collections.abc import Mapping

import trio

from dsd_p2p.coordination.draft_places import Offer
from dsd_p2p.coordination.own_drafter import OwnDrafter
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource
from dsd_p2p.peers.membership import Membership
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.types import PeerId
from node.config import ServeFlags
from node.config.machine import available_bytes
from node.local.events import Loading
from node.member.placed import Placed
from node.member.settings import PeerSettings

_MEMORY_SHARE = 0.3
"""Share of the free memory that a drafter may take; the layers may take 0.6 (`.measure`)."""


class _ReportedProgress(Progress):
    """Passes what is loaded on as the peer's events, each once."""

    def __init__(self, settings: PeerSettings) -> None:
        self._settings = settings
        self._last = ""

    def step(self, what: str, done: int, total: int) -> None:
        """Report `what` if it is new."""
        if what != self._last:
            self._last = what
            self._settings.report(Loading(what=what))


def wanted_drafter(config: ServeFlags, registry: Registry) -> str:
    """Return the drafter that this peer should use: its user's, or else the owner's."""
    return config.draft or (registry.choice.draft if registry.choice else "auto")


class MemberDrafts:
    """The drafter of one peer. wanted: the name that its user or the owner chose; "none" if it does not coordinate."""

    def __init__(self, settings: PeerSettings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self.wanted = wanted_drafter(settings.config, registry)

    def choice(self) -> DrafterChoice | None:
        """Return the choice among the drafters that are wanted now, or None if this peer does not coordinate."""
        settings = self._settings
        if self.wanted == "none":
            return None
        return choice_of(
            self.wanted,
            settings.source,
            settings.stored.model,
            settings.config,
            _ReportedProgress(settings),
        )

    def offers(self, directory: SwarmDirectory) -> Mapping[PeerId, Offer]:
        """Return what other members offer to draft with; nothing where prompt lookup was asked for by name."""
        return {} if self.wanted == LOOKUP.name else directory.draft_offers()

    async def follow(self, own: OwnDrafter, membership: Membership, placed: Placed) -> None:
        """Tell the swarm when another drafter is in use, and take the owner's later choices, until cancelled."""
        changes, heard = trio.open_memory_channel[None](1)

        def note() -> None:
            if not changes.statistics().current_buffer_used:
                changes.send_nowait(None)

        own.changed = note
        note()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_choices, own, membership)
            async for _ in heard:
                await placed.tell_drafter(membership, own.current.name, own.step_s)

    async def _take_choices(self, own: OwnDrafter, membership: Membership) -> None:
        while True:
            wanted = wanted_drafter(self._settings.config, self._registry)
            if wanted != self.wanted:
                self.wanted = wanted
                choice = self.choice()
                if choice is not None:
                    own.choose(choice)
            await membership.changed()


def choice_of(
    wanted: str, source: ModelSource, model: str, config: ServeFlags, progress: Progress | None = None
) -> DrafterChoice:
    """Return the choice among the drafters of a swarm's model on this machine. model: its name in the swarm."""
    return DrafterChoice(
        wanted,
        source,
        model=model,
        device=config.device,
        room_bytes=int(_MEMORY_SHARE * available_bytes()),
        progress=progress,
    )
