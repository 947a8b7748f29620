"""Implements `dsd join INVITE`: the only command that another machine needs."""

from dsd_p2p.swarm.invite import parse_invite
from node.config import GatewayConfig, JoinConfig
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState


def run(config: JoinConfig, gateway: GatewayConfig) -> int:
    """Accept the invite and serve until stopped. A client's invite only lets this machine send requests."""
    invite = parse_invite(config.invite)
    from node.member.model import absolute_model

    stored = SwarmState(config.swarm).join(invite, absolute_model(config.model))
    if stored.grants[-1].role == "client":
        print(f"this machine is a client of the swarm: dsd generate --swarm {config.swarm} --prompt '...'")
        return 0
    return serve_swarm(config, tell_user, gateway)
