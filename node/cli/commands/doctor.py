"""Implements `dsd doctor`: within ten seconds, report which peers are reachable, what is slow or wrong, and the fix."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from dsd_p2p.drafting.named import LOOKUP
from dsd_p2p.errors import ConfigError, DsdError, PeerError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import is_cached
from dsd_p2p.types import PeerId, short_peer
from dsd_p2p.wire.messages import MAX_PING_BYTES
from node.config import SwarmQuestion
from node.config.machine import available_bytes
from node.member.client import SwarmClient, open_swarm_client
from node.member.control import PeerReport, Status, ask_node
from node.member.model import find_member_model
from node.member.state import StoredMembership, SwarmState

_DEADLINE_S = 9.5
_PING_TIMEOUT_S = 2.0
_SLOW_BPS = 20e6
_SLOW_S = 0.3
_SKEW_S = 5.0
_LOW_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check. fix: the command or advice that solves the problem, empty when there is none."""

    what: str
    is_ok: bool
    says: str
    fix: str = ""


def run(config: SwarmQuestion) -> int:
    """Print the findings and return the exit code: 1 when something is wrong."""
    state = SwarmState(config.swarm)
    findings = trio.run(examine, state)
    if config.json:
        print(msgspec.json.encode(findings).decode())
    else:
        table = Table(box=None, show_header=False)
        for finding in findings:
            table.add_row("[green]ok[/]" if finding.is_ok else "[red]!![/]", finding.what, finding.says)
            if finding.fix:
                table.add_row("", "", f"[bold]{finding.fix}[/]")
        Console(highlight=False).print(table)
    return 0 if all(finding.is_ok for finding in findings) else 1


async def examine(state: SwarmState) -> list[Finding]:
    """Return everything found before the deadline, problems last."""
    findings: list[Finding] = []
    with trio.move_on_after(_DEADLINE_S) as scope:
        findings += _machine(state)
        try:
            stored = state.membership()
        except ConfigError as exc:
            findings.append(Finding(what="membership", is_ok=False, says=str(exc), fix="dsd join INVITE"))
            return findings
        findings += _membership(state, stored)
        findings.append(_model(stored))
        findings += await _node(state)
        if stored.model not in CATALOG or is_cached(stored.model):
            findings += await _neighbours(state, stored)
    if scope.cancelled_caught:
        says = f"some checks did not finish within {_DEADLINE_S:g} s"
        findings.append(Finding(what="time", is_ok=False, says=says, fix="dsd members"))
    return sorted(findings, key=lambda finding: not finding.is_ok)


def _machine(state: SwarmState) -> list[Finding]:
    memory, disk = available_bytes(), shutil.disk_usage(Path.home()).free
    return [
        Finding(
            what="memory",
            is_ok=memory >= _LOW_BYTES,
            says=f"{memory / 2**30:.1f} GiB free",
            fix="" if memory >= _LOW_BYTES else f"dsd node --swarm {state.name} --max-layers 2 --cache-memory 200MB",
        ),
        Finding(
            what="disk",
            is_ok=disk >= _LOW_BYTES,
            says=f"{disk / 2**30:.1f} GiB free under {default_cache_dir()}",
            fix="" if disk >= _LOW_BYTES else f"rm -r {default_cache_dir() / 'downloads'}",
        ),
    ]


def _membership(state: SwarmState, stored: StoredMembership) -> list[Finding]:
    left_s = min(grant.expires_at_s for grant in stored.grants) - time.time()
    return [
        Finding(
            what="membership",
            is_ok=left_s > 0,
            says=f"{stored.grants[-1].role} of swarm {stored.swarm.hex()[:12]}, "
            + (f"for another {left_s / 86400:.1f} days" if left_s > 0 else "expired"),
            fix="" if left_s > 0 else f"dsd join NEW_INVITE --swarm {state.name}",
        )
    ]


def _model(stored: StoredMembership) -> Finding:
    if stored.model in CATALOG and not is_cached(stored.model):
        says = f"{stored.model} is not in the cache"
        return Finding(what="model", is_ok=False, says=says, fix=f"dsd models pull {stored.model}")
    try:
        source = find_member_model(stored, NoProgress())
    except DsdError as exc:
        return Finding(what="model", is_ok=False, says=str(exc), fix="dsd join INVITE --model FOLDER")
    return Finding(what="model", is_ok=True, says=f"{stored.model} {stored.dtype}, digest {source.digest()[:12]}")


async def _node(state: SwarmState) -> list[Finding]:
    try:
        status = await ask_node(state.control_socket, Status(), timeout_s=2)
    except DsdError as exc:
        if state.membership().grants[-1].role == "client":
            return [Finding(what="node", is_ok=True, says="none: this machine is a client")]
        return [Finding(what="node", is_ok=False, says=str(exc), fix=f"dsd node --swarm {state.name}")]
    assert isinstance(status, PeerReport)
    others = [member for member in status.members if member.peer != status.peer and member.is_alive]
    public = [address for address in status.addresses if "/127." not in address]
    return [
        Finding(what="node", is_ok=True, says=f"{status.state}, layers {status.span}, {status.num_sessions} sessions"),
        Finding(
            what="ports",
            is_ok=bool(public),
            says=f"listens on {', '.join(a.partition('/p2p/')[0] for a in status.addresses[:3])}",
            fix="" if public else f"dsd node --swarm {state.name} --listen /ip4/0.0.0.0/tcp/4001",
        ),
        Finding(
            what="members",
            is_ok=bool(others),
            says=f"{len(others)} other members reached",
            fix="" if others else "open TCP port 4001 in the firewall, or start with --through RELAY_ADDRESS",
        ),
        _drafter(status, state),
        Finding(
            what="coverage",
            is_ok=not status.uncovered,
            says=f"all {status.num_layers} layers served"
            if not status.uncovered
            else f"no peer serves layers {status.uncovered}",
            fix="" if not status.uncovered else "dsd invite, and dsd join on another machine",
        ),
    ]


def _drafter(status: PeerReport, state: SwarmState) -> Finding:
    """Say what this peer drafts with, and how it could do better."""
    own = next((member for member in status.members if member.peer == status.peer), None)
    name = own.drafter if own is not None else ""
    refused = f"; refused: {'; '.join(status.refused_drafters)}" if status.refused_drafters else ""
    says = f"{name or 'none'}, the choice is {status.draft}{refused}"
    if own is not None and own.draft_s:
        says += f", {own.draft_s * 1e3:.0f} ms a step"
    is_worse = bool(status.refused_drafters) and name == LOOKUP.name
    fix = f"dsd node --swarm {state.name} --draft MODEL with a small model of the target's tokenizer"
    return Finding(what="drafter", is_ok=not is_worse, says=says, fix=fix if is_worse else "")


async def _neighbours(state: SwarmState, stored: StoredMembership) -> list[Finding]:
    """Return one finding per member (direct or relayed, round trip, bandwidth) and one about this machine's clock."""
    source = find_member_model(stored, NoProgress())
    findings: list[Finding] = []
    try:
        async with (
            open_swarm_client(state, source, LOOKUP, meet_timeout_s=4) as client,
            trio.open_nursery() as nursery,
        ):
            await trio.sleep(1.5 * client.membership.registry.interval_s)
            for member in client.membership.registry.members():
                if member.peer in client.membership.links.connected:
                    nursery.start_soon(_neighbour, client, member.peer, findings)
                elif member.record.profile.max_layers and member.record.state != "left":
                    says = f"known, not reached at {', '.join(member.record.info.addresses[:2])}"
                    findings.append(
                        Finding(what=short_peer(member.peer), is_ok=False, says=says, fix="dsd doctor there")
                    )
            findings.append(_clock(client))
    except DsdError as exc:
        fix = "check the network, then: dsd join NEW_INVITE"
        findings.append(Finding(what="swarm", is_ok=False, says=str(exc), fix=fix))
    return findings


async def _neighbour(client: SwarmClient, peer: PeerId, findings: list[Finding]) -> None:
    links = client.membership.links
    try:
        trip_s = min([await links.round_trip_s(peer, _PING_TIMEOUT_S) for _ in range(3)])
        wide_s = await links.round_trip_s(peer, _PING_TIMEOUT_S, MAX_PING_BYTES)
    except PeerError as exc:
        findings.append(Finding(what=short_peer(peer), is_ok=False, says=str(exc), fix="dsd doctor there"))
        return
    rate_bps = MAX_PING_BYTES * 8 / max(1e-6, wide_s - trip_s)
    is_relayed = client.transport.is_relayed(peer)
    is_slow = trip_s > _SLOW_S or rate_bps < _SLOW_BPS
    says = f"{'relayed' if is_relayed else 'direct'}, {trip_s * 1e3:.1f} ms, {rate_bps / 1e6:.0f} Mbit/s"
    fix = ""
    if is_relayed:
        fix = "open TCP port 4001 on that machine, then restart its `dsd node` without --through"
    elif is_slow:
        fix = "dsd plan shows whether routes avoid it"
    findings.append(Finding(what=short_peer(peer), is_ok=not (is_relayed or is_slow), says=says, fix=fix))


def _clock(client: SwarmClient) -> Finding:
    """Compare our clock with the times in the members' records: a record from our future means a slow clock."""
    members = [member for member in client.membership.registry.members() if member.is_alive]
    ahead_s = max((member.record.sequence / 1e3 - time.time() for member in members), default=0.0)
    is_ok = ahead_s < _SKEW_S
    says = "agrees with the other members" if is_ok else f"{ahead_s:.0f} s behind another member"
    return Finding(what="clock", is_ok=is_ok, says=says, fix="" if is_ok else "timedatectl set-ntp true")
