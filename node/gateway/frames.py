"""Frames the events of a stream as server-sent events."""

import msgspec


class EventFrames:
    """What formats that send server-sent events share. beat: what is sent while nothing arrives."""

    content_type = "text/event-stream; charset=utf-8"
    beat = b": waiting\n\n"

    def framed(self, event: object) -> bytes:
        """Return an event; one that has a "type" is sent under it as its name."""
        name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
        return name + b"data: " + msgspec.json.encode(event) + b"\n\n"
