"""`dsd create`: a new swarm, and its first node."""

from node.config import CreateConfig, GatewayConfig
from node.console import console
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState


def run(config: CreateConfig, gateway: GatewayConfig) -> int:
    """Make the swarm and serve until stopped."""
    SwarmState(config.swarm).create(model=config.model, dtype=config.dtype)
    console.print(f"swarm {config.swarm!r} is made; let others in with `dsd invite` on this machine")
    return serve_swarm(config, tell_user, gateway)
