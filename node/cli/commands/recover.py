"""Implements `dsd recover`: bring the owner's key back to a machine of the swarm, from the recovery key."""

import getpass
import sys

from node.config import RecoverConfig
from node.member.state import SwarmState


def run(config: RecoverConfig) -> int:
    """Read the recovery key, without an echo from a terminal or as a line of standard input, and store it."""
    state = SwarmState(config.swarm)
    state.membership()
    words = getpass.getpass("recovery key: ") if sys.stdin.isatty() else sys.stdin.readline()
    state.recover_owner(words.strip())
    print(f"this machine can act for the owner of swarm {config.swarm!r} again; to end that: rm {state.owner_file}")
    return 0
