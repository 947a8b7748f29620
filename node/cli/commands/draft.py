"""Implements `dsd draft MODEL`: let the owner choose the drafter of the whole swarm."""

import time

import trio

from dsd_p2p.swarm.grants import choose
from node.config import DraftConfig
from node.member.control import Choose, ask_node
from node.member.state import SwarmState


def run(config: DraftConfig) -> int:
    """Sign the choice and let this machine's node daemon spread it."""
    state = SwarmState(config.swarm)
    owner, stored = state.owner_key(), state.membership()
    choice = choose(owner, stored.swarm, config.draft, int(time.time() * 1e3))
    trio.run(ask_node, state.control_socket, Choose(choice=choice))
    print(f"members without a --draft of their own now load {config.draft}")
    return 0
