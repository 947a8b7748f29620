"""Implements `dsd rekey`: give the swarm a new network key, which whoever was revoked does not get."""

import secrets
import time

import trio

from dsd_p2p.swarm.grants import new_network_key
from node.config import RekeyConfig
from node.member.control import NewKey, PeerReport, Status, ask_node
from node.member.state import SwarmState


def run(config: RekeyConfig) -> int:
    """Sign the key and let this machine's node daemon spread it."""
    state = SwarmState(config.swarm)
    owner, stored = state.owner_key(), state.membership()
    status = trio.run(ask_node, state.control_socket, Status())
    assert isinstance(status, PeerReport)
    rekey = new_network_key(
        owner,
        stored.swarm,
        secrets.token_bytes(32),
        state.authority().revocations,
        max(time.time_ns() // 1_000_000, stored.key_made_at_ms + 1),
    )
    trio.run(ask_node, state.control_socket, NewKey(rekey=rekey))
    num_alive = sum(member.is_alive for member in status.members)
    print(f"{num_alive} members get the new network key now; their connections end and come back within seconds")
    away = [member.peer for member in status.members if not member.is_alive]
    if away:
        print(f"{len(away)} members were not reached and need a new invite: `dsd invite`, there `dsd join`")
    print("invites that were made before are void")
    return 0
