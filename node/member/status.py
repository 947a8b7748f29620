"""Builds the node daemon's answer to `Status`."""

import os
import time

from dsd_p2p.keys import peer_of
from dsd_p2p.peers.membership import Membership
from dsd_p2p.transport.libp2p import Libp2pTransport
from node.member.control import MemberStatus, PeerReport
from node.member.parts import PeerParts


def node_status(parts: PeerParts) -> PeerReport:
    """Return the report on this peer for `dsd node status` and other commands."""
    admission = parts.membership.registry.admission
    links, load, stored = parts.membership.links, parts.placed.load(), parts.settings.stored
    return PeerReport(
        peer=links.me.peer,
        pid=os.getpid(),
        addresses=list(parts.transport.addresses),
        model=stored.model,
        dtype=stored.dtype,
        span=str(links.me.span or ""),
        state=parts.placed.state,
        num_layers=parts.shape.num_layers,
        num_sessions=load.num_sessions,
        cache_bytes=load.cache_bytes,
        num_refused=links.num_refused,
        num_frames=links.num_frames,
        members=_member_statuses(parts.membership, parts.transport),
        uncovered=parts.directory.view().uncovered(),
        draft=parts.drafts.wanted,
        refused_drafters=parts.engine.own_drafter.refusals if parts.engine else [],
        uses={peer_of(issuer): [peer_of(key) for key in keys] for issuer, keys in admission.stored.uses},
        revoked=[peer_of(each.subject) for each in admission.revocations],
    )


def _member_statuses(membership: Membership, transport: Libp2pTransport) -> list[MemberStatus]:
    connected = membership.links.connected
    return [
        MemberStatus(
            peer=member.peer,
            state=member.record.state,
            is_alive=member.is_alive,
            role=member.record.grants[-1].role,
            span=str(member.record.info.span or ""),
            addresses=list(member.record.info.addresses),
            round_trip_s=member.round_trip_s,
            is_relayed=member.peer in connected and transport.is_relayed(member.peer),
            num_sessions=member.num_sessions,
            cache_bytes=member.cache_bytes,
            max_layers=member.record.profile.max_layers,
            layer_s=member.record.profile.layer_us / 1e6,
            version=member.record.version,
            drafter=member.record.profile.drafter,
            draft_s=member.record.profile.draft_us / 1e6,
            invite=peer_of(member.record.grants[-2].subject) if len(member.record.grants) > 1 else "",
            age_s=max(0.0, time.time() - member.record.incarnation / 1e3),
        )
        for member in membership.registry.members()
    ]
