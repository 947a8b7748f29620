"""Describes a picture as one object for JSON, for scripts and web pages."""

from dsd_p2p.telemetry.events import SCHEMA
from dsd_p2p.telemetry.picture import Picture, SessionView


def describe(picture: Picture) -> dict[str, object]:
    """Return the picture as plain dictionaries and lists."""
    running = picture.running
    return {
        "schema": SCHEMA,
        "tokens_per_s": round(picture.tokens_per_s, 2),
        "totals": dict(picture.totals),
        "acceptance_by_depth": [round(share, 4) for share in picture.acceptance()],
        "windows_in_flight": sum(view.newest.num_in_flight for view in running),
        "peers": [
            {
                "peer": peer,
                "is_online": status.is_online and not picture.is_silent(peer),
                "roles": list(status.roles),
                "version": status.version,
                "model": status.model,
                "span": [status.first, status.last],
                "state": status.state,
                "num_sessions": status.num_sessions,
                "queue": status.queue,
                "busy_share": round(status.busy_share, 3),
                "cache_bytes": status.cache_bytes,
                "max_cache_bytes": status.max_cache_bytes,
                "links_s": status.links_s,
            }
            for peer, status in picture.peers.items()
        ],
        "sessions": [_session(view, picture.now_s) for view in running],
        "alerts": [{"level": alert.level, "text": alert.text} for alert in picture.alerts()],
    }


def _session(view: SessionView, now_s: float) -> dict[str, object]:
    newest = view.newest
    return {
        "session": view.session,
        "coordinator": view.coordinator,
        "stages": [stage.peer for stage in view.stages],
        "drafter": view.drafter,
        "mode": newest.mode,
        "decision": newest.decision,
        "reason": newest.reason,
        "num_tokens": newest.num_tokens,
        "tokens_per_s": round(view.tokens_per_s(now_s), 2),
        "windows_in_flight": newest.num_in_flight,
        "num_replays": view.num_replays,
    }
