"""Draws a picture of a swarm for a given screen size. It is readable at 80x24 and at 200x60, and without colour."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsd_p2p.telemetry.events import PeerStatus
from dsd_p2p.telemetry.picture import Picture, SessionView
from dsd_p2p.types import short_peer

_BARS = "▁▂▃▄▅▆▇█"
_MAX_ALERTS = 3


class Sort(StrEnum):
    """The order of the peers."""

    LAYERS = "layers"
    BUSY = "busy"
    QUEUE = "queue"


@dataclass(slots=True)
class Choices:
    """What the user has chosen, and the state of the source.

    cursor: index into the peers followed by the requests. is_drilled: show the details of that item, not the overview.
    """

    sort: Sort = Sort.LAYERS
    is_paused: bool = False
    cursor: int = 0
    is_drilled: bool = False
    source: str = ""
    trouble: str = ""


def render(picture: Picture, choices: Choices, width: int, height: int) -> RenderableType:
    """Return the whole screen."""
    peers = sorted_peers(picture, choices.sort)
    sessions = picture.running
    items: list[PeerStatus | SessionView] = [*peers, *sessions]
    choices.cursor = max(0, min(choices.cursor, len(items) - 1))
    parts: list[RenderableType] = [_headline(picture, choices, width)]
    alerts = picture.alerts()
    for alert in alerts[:_MAX_ALERTS]:
        style = "bold red" if alert.level == 2 else "yellow"
        parts.append(_line(f"{'!!' if alert.level == 2 else ' !'} {alert.text}", width, style))
    if len(alerts) > _MAX_ALERTS:
        parts.append(_line(f" ! and {len(alerts) - _MAX_ALERTS} more", width, "yellow"))
    if choices.is_drilled and items:
        item = items[choices.cursor]
        parts += (
            _peer_details(picture, item, width)
            if isinstance(item, PeerStatus)
            else _session_details(picture, item, width)
        )
        parts.append(_keys(width))
        return Group(*parts)
    parts += [_throughput(picture, width), _quality(picture, width)]
    room = max(4, height - len(parts) - 2)
    num_ring = min(len(_ring_lines(picture, width)), max(1, room // 6))
    parts += _ring_lines(picture, width)[:num_ring]
    room -= num_ring
    num_peers = min(len(peers), max(2, room - 3 - min(len(sessions), max(2, room // 3))))
    parts.append(_peer_table(picture, peers[:num_peers], len(peers), choices, width))
    num_sessions = max(1, room - num_peers - 2)
    parts.append(_session_table(picture, sessions[:num_sessions], len(sessions), choices, len(peers), width))
    parts.append(_keys(width))
    return Group(*parts)


def sorted_peers(picture: Picture, sort: Sort) -> list[PeerStatus]:
    """Return the peers in the order of `sort`; by layers, stages come first."""
    keys = {
        Sort.LAYERS: lambda peer: (not peer.last, peer.first, peer.peer),
        Sort.BUSY: lambda peer: (-peer.busy_share, peer.peer),
        Sort.QUEUE: lambda peer: (-peer.queue, peer.peer),
    }
    return sorted(picture.peers.values(), key=keys[sort])


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the newest `width` values as bars, the oldest first."""
    recent = list(values)[-width:]
    top = max(recent, default=0)
    return "".join(_BARS[min(7, int(8 * value / top)) if top else 0] for value in recent)


def _headline(picture: Picture, choices: Choices, width: int) -> Text:
    online = sum(status.is_online and not picture.is_silent(peer) for peer, status in picture.peers.items())
    models = sorted({status.model for status in picture.peers.values() if status.model})
    text = f"dsd  {models[0] if models else '-'}  {online}/{len(picture.peers)} peers  {len(picture.running)} requests"
    if choices.is_paused:
        text += "  PAUSED"
    text += f"  {choices.source}"
    if choices.trouble:
        text += f"  ({choices.trouble})"
    return _line(text, width, "bold")


def _throughput(picture: Picture, width: int) -> Text:
    rate = f"tokens/s {picture.tokens_per_s:7.1f} "
    in_flight = sum(view.newest.num_in_flight for view in picture.running)
    tail = f" {in_flight} windows in flight"
    return _line(
        rate + sparkline(list(picture.series)[:-1], max(8, width - len(rate) - len(tail) - 1)) + tail, width, "cyan"
    )


def _quality(picture: Picture, width: int) -> Text:
    shares = " ".join(f"{share:.0%}" for share in picture.acceptance()[:8]) or "-"
    totals = picture.totals
    sent = totals["num_nodes"]
    text = (
        f"guesses right by depth {shares}  misses {totals['num_misses']}  stale {totals['num_stale'] / sent if sent else 0:.0%}"
        f"  relaxed {totals['num_relaxed']}  replays {totals['replays']}  failed {totals['failed']}"
    )
    return _line(text, width)


def _ring_lines(picture: Picture, width: int) -> list[Text]:
    """Return one line per route in use: peers, layers, round trips. Without requests, list all stages in order."""
    routes: dict[tuple[tuple[str, int, int], ...], str] = {}
    for view in picture.running:
        stages = tuple((stage.peer, stage.first, stage.last) for stage in view.stages)
        if stages:
            routes.setdefault(stages, view.coordinator)
    if not routes:
        held = sorted((p.first, p.last, p.peer) for p in picture.peers.values() if p.last and p.is_online)
        if held:
            coordinator = next((p.peer for p in picture.peers.values() if "coordinator" in p.roles and not p.last), "")
            routes[tuple((peer, first, last) for first, last, peer in held[:64])] = coordinator
    return [_line(_ring(picture, stages, coordinator), width, "green") for stages, coordinator in routes.items()]


def _ring(picture: Picture, stages: tuple[tuple[str, int, int], ...], coordinator: str) -> str:
    text, before = short_peer(coordinator), coordinator
    for peer, first, last in stages:
        text += f" ─{_round_trip(picture, before, peer)}─ {short_peer(peer)}[{first}:{last}]"
        before = peer
    return f"{text} ─{_round_trip(picture, before, coordinator)}─ ↩"


def _round_trip(picture: Picture, one: str, other: str) -> str:
    for a, b in ((one, other), (other, one)):
        if (status := picture.peers.get(a)) is not None and b in status.links_s:
            return f"{1000 * status.links_s[b]:.0f}ms"
    return "?"


def _peer_table(picture: Picture, peers: Sequence[PeerStatus], num_all: int, choices: Choices, width: int) -> Table:
    table = _table(f"peers {len(peers)}/{num_all}" if len(peers) < num_all else f"peers {num_all}", width)
    is_wide = width >= 110
    for name, justify in (
        ("peer", "left"),
        ("layers", "left"),
        ("busy", "right"),
        ("queue", "right"),
        ("sess", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("cache", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, overflow="ellipsis")
    if is_wide:
        for name in ("busy share", "version", "roles", "passes"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
    for index, peer in enumerate(peers):
        silent = picture.is_silent(peer.peer)
        state = "offline" if not peer.is_online else "silent" if silent else peer.state or "-"
        cells = [
            _mark(index == choices.cursor) + short_peer(peer.peer),
            f"{peer.first}:{peer.last}" if peer.last else "-",
            f"{peer.busy_share:.0%}",
            str(peer.queue),
            str(peer.num_sessions),
            f"{peer.cache_bytes / peer.max_cache_bytes:.0%}" if peer.max_cache_bytes else "-",
            state,
        ]
        if is_wide:
            cells += [_bar(peer.busy_share, 10), peer.version or "-", ",".join(peer.roles), str(peer.num_passes)]
        table.add_row(*map(_cell, cells), style="red" if state in ("offline", "silent") else None)
    return table


def _session_table(
    picture: Picture, views: Sequence[SessionView], num_all: int, choices: Choices, first: int, width: int
) -> Table:
    table = _table(f"requests {len(views)}/{num_all}" if len(views) < num_all else f"requests {num_all}", width)
    for name, justify in (
        ("request", "left"),
        ("tokens", "right"),
        ("tok/s", "right"),
        ("fly", "right"),
        ("mode", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    for index, view in enumerate(views):
        newest = view.newest
        cells = (
            _mark(first + index == choices.cursor) + view.session[:8],
            f"{newest.num_tokens}/{view.max_tokens or '?'}",
            f"{view.tokens_per_s(picture.now_s):.1f}",
            str(newest.num_in_flight),
            newest.decision or newest.mode or "-",
            newest.reason + (f" ({view.num_replays} replays)" if view.num_replays else ""),
        )
        table.add_row(*map(_cell, cells))
    return table


def _peer_details(picture: Picture, peer: PeerStatus, width: int) -> list[RenderableType]:
    lines = [
        f"peer      {peer.peer}",
        f"state     {peer.state or '-'}, {'online' if peer.is_online else 'offline'}, version {peer.version or '?'}",
        f"serves    {peer.model or '-'} {peer.dtype} layers {peer.first}:{peer.last} of {peer.num_layers}",
        f"roles     {', '.join(peer.roles) or '-'}",
        f"busy      {peer.busy_share:.0%} {_bar(peer.busy_share, 20)}  queue {peer.queue}  sessions {peer.num_sessions}",
        f"cache     {peer.cache_bytes / 2**20:.0f} of {peer.max_cache_bytes / 2**20:.0f} MiB",
        f"passes    {peer.num_passes}, {peer.num_windows / max(1, peer.num_passes):.2f} windows in each",
        f"left out  {peer.num_dropped} events",
        *(f"link to   {short_peer(other)} {1000 * seconds:.1f} ms" for other, seconds in sorted(peer.links_s.items())),
    ]
    return [_line(line, width) for line in lines]


def _session_details(picture: Picture, view: SessionView, width: int) -> list[RenderableType]:
    newest = view.newest
    pairs = zip(newest.hits_by_depth, newest.outcomes_by_depth, strict=False)
    shares = " ".join(f"{hits / outcomes:.0%}" for hits, outcomes in pairs if outcomes)
    lines = [
        f"request   {view.session} of {short_peer(view.coordinator)}, drafter {view.drafter or '-'}",
        f"written   {newest.num_tokens} of {view.max_tokens or '?'} tokens at {view.tokens_per_s(picture.now_s):.1f}/s",
        f"policy    {newest.decision or '-'}: {newest.reason or '-'}",
        f"in flight {newest.num_in_flight}, a traversal takes {1000 * newest.traversal_s:.0f} ms",
        f"sent      {newest.num_windows} windows, {newest.num_nodes} nodes, {newest.num_stale} stale",
        f"misses    {newest.num_misses}  relaxed {newest.num_relaxed}  replays {view.num_replays}",
        f"right  {shares or '-'} of the guesses, by depth",
        "route     " + " → ".join(f"{short_peer(stage.peer)}[{stage.first}:{stage.last}]" for stage in view.stages),
        "stages    " + " ".join(f"{us / 1000:.1f}ms" for us in newest.stage_us),
    ]
    return [_line(line, width) for line in lines]


def _keys(width: int) -> Text:
    return _line("q quit  space pause  s sort  ↑↓ choose  enter look closer  esc back", width, "dim")


def _table(title: str, width: int) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        width=width,
        show_edge=False,
    )


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(_plain(text), style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line


def _cell(text: str) -> Text:
    return Text(_plain(text))


def _plain(text: str) -> str:
    """Replace unprintable characters, so that text from peers cannot control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _mark(is_chosen: bool) -> str:
    return "› " if is_chosen else "  "


def _bar(share: float, width: int) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)
