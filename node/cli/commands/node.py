"""`dsd node`: one stage started by hand, or this machine's node of a swarm."""

import msgspec
import trio

from dsd_p2p import units
from node.config import DEFAULT_SWARM, NodeConfig, ServeFlags, read_config, read_with_gateway
from node.local.stage_node import serve
from node.member.control import Ask, Status, Stop, ask_node
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState
from node.parent import watch_parent


def run(options: dict[str, object]) -> int:
    """Serve until stopped."""
    if options.pop("exit_with_parent", False):
        watch_parent()
    file = options.pop("config", None)
    action, drain = options.pop("action", "run"), str(options.pop("drain", "30s"))
    if action != "run":
        state = SwarmState(str(options.get("swarm", DEFAULT_SWARM)))
        drain_s = units.seconds(drain)
        ask: Ask = Stop(drain_s=drain_s) if action == "stop" else Status()
        print(msgspec.json.encode(trio.run(ask_node, state.control_socket, ask, drain_s + 10)).decode())
        return 0
    if "swarm" in options:
        config, door = read_with_gateway(ServeFlags, str(file) if file else None, options)
        return serve_swarm(config, tell_user, door)
    return serve(read_config(NodeConfig, str(file) if file else None, options), tell_user)
