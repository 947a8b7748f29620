"""`dsd join INVITE`: everything a second machine types."""

from dsd_p2p.swarm.invite import parse_invite
from node.config import JoinConfig, read_with_gateway
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState


def run(options: dict[str, object]) -> int:
    """Take the invite and serve until stopped; a client's invite only lets this machine's commands in."""
    file = options.pop("config", None)
    config, door = read_with_gateway(JoinConfig, str(file) if file else None, options)
    invite = parse_invite(config.invite)
    stored = SwarmState(config.swarm).join(invite)
    if stored.grants[-1].role == "client":
        print(f"this machine is a client of the swarm: dsd generate --swarm {config.swarm} --prompt '...'")
        return 0
    return serve_swarm(config, tell_user, door)
