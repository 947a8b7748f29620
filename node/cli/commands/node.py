"""Implements `dsd node`: run this machine's peer of a swarm, or one stage by hand."""

from typing import TypeVar

import msgspec
import trio

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from node.config import FlagError, GatewayConfig, NodeCommand, NodeConfig, ServeFlags
from node.local.stage_node import serve
from node.member.control import Ask, Status, Stop, ask_node
from node.member.process import serve_swarm, tell_user
from node.member.state import SwarmState
from node.parent import watch_parent

Kind = TypeVar("Kind", ServeFlags, NodeConfig)

_BY_HAND = ("model", "dtype", "span", "peers", "identity")


def run(config: NodeCommand, gateway: GatewayConfig) -> int:
    """Serve until stopped, or send a command to the running node daemon."""
    if config.exit_with_parent:
        watch_parent()
    if config.action != "run":
        return _ask(config)
    if config.swarm:
        return serve_swarm(_as_member(config), tell_user, gateway)
    stage = _as_stage(config)
    if not config.exit_with_parent:
        _check_listen(stage.listen)
    return serve(stage, tell_user)


def _check_listen(listen: str) -> None:
    """Check that only this machine reaches a stage that lets everybody in.

    Raises:
        ConfigError: other machines reach it.
    """
    if not listen.startswith(("/ip4/127.", "/ip6/::1/", "/dns4/localhost/")):
        raise ConfigError(
            f"--listen {listen} opens the stage to the network, and outside a swarm it serves whoever comes: create a "
            "swarm with `dsd create`, or listen on /ip4/127.0.0.1/tcp/0"
        )


def _ask(config: NodeCommand) -> int:
    state = SwarmState(config.swarm) if config.swarm else SwarmState(ServeFlags().swarm)
    drain_s = units.seconds(config.drain)
    ask: Ask = Stop(drain_s=drain_s) if config.action == "stop" else Status()
    print(msgspec.json.encode(trio.run(ask_node, state.control_socket, ask, drain_s + 10)).decode())
    return 0


def _as_member(config: NodeCommand) -> ServeFlags:
    given = [name for name in _BY_HAND if getattr(config, name)]
    if given:
        raise FlagError(f"--{given[0]} applies only to a stage started by hand: leave it out, or leave out --swarm")
    return _narrowed(config, ServeFlags)


def _as_stage(config: NodeCommand) -> NodeConfig:
    return _narrowed(config, NodeConfig)


def _narrowed(config: NodeCommand, kind: type[Kind]) -> Kind:
    """Return the settings that both structs have. An empty setting of the command keeps the default of `kind`."""
    names = set(kind.__struct_fields__) & set(config.__struct_fields__)
    values = {name: getattr(config, name) for name in names}
    return msgspec.convert({name: value for name, value in values.items() if value not in ("", ())}, kind)
