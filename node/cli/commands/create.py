"""Implements `dsd create`: create a swarm and run its first peer."""

from node.config import CreateConfig, GatewayConfig
from node.console import console
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState


def run(config: CreateConfig, gateway: GatewayConfig) -> int:
    """Create the swarm and serve until stopped."""
    SwarmState(config.swarm).create(model=config.model, dtype=config.dtype)
    console.print(f"swarm {config.swarm!r} created; to add other machines, run `dsd invite` here")
    return serve_swarm(config, tell_user, gateway)
