"""Holds the parts of a connected swarm peer."""

from dataclasses import dataclass

from dsd_p2p.coordination.engine import Engine
from dsd_p2p.coordination.for_others import ThinClient
from dsd_p2p.coordination.swarm_directory import SwarmDirectory
from dsd_p2p.models.architecture import ModelShape
from dsd_p2p.peers.membership import Membership
from dsd_p2p.peers.rekeying import Rekeying
from dsd_p2p.peers.services import Service
from dsd_p2p.stage.server import StageServer
from dsd_p2p.transport.libp2p import Libp2pTransport
from node.member.drafts import MemberDrafts
from node.member.placed import Placed
from node.member.settings import PeerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerParts:
    """The parts of a connected swarm peer.

    placed: decides which layers it serves. engine: None if it does not coordinate. services: handle its messages.
    """

    settings: PeerSettings
    shape: ModelShape
    transport: Libp2pTransport
    membership: Membership
    rekeying: Rekeying
    directory: SwarmDirectory
    server: StageServer
    placed: Placed
    engine: Engine | None
    thin: ThinClient
    drafts: MemberDrafts
    services: tuple[Service, ...]
