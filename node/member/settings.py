"""Holds the settings that a swarm peer starts with."""

from collections.abc import Callable
from dataclasses import dataclass

from dsd_p2p.models.architecture import ModelShape, read_shape
from dsd_p2p.models.describe import stage_info
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.membership import PeerProfile
from node.config import GatewayConfig, ServeFlags
from node.local.events import StageEvent
from node.member.measure import Machine
from node.member.state import StoredMembership, SwarmState


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """The settings of a swarm peer. profile: measured speed of this machine. report: called with the peer's events."""

    config: ServeFlags
    gateway: GatewayConfig
    state: SwarmState
    stored: StoredMembership
    source: ModelSource
    profile: PeerProfile
    machine: Machine
    report: Callable[[StageEvent], None]

    @property
    def shape(self) -> ModelShape:
        """The sizes of the swarm's model."""
        return read_shape(self.source.folder)

    def describe(self, span: Span | None, addresses: tuple[str, ...]) -> PeerInfo:
        """Return the description that the peer announces while it serves `span`."""
        peer = self.state.node_key().peer
        return stage_info(self.source, self.stored.dtype, self.shape, peer=peer, addresses=addresses, span=span)
