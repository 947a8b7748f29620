"""Frames the events of a stream as server-sent events."""

import msgspec

from node.gateway.errors import ApiError


class EventFrames:
    """What formats that send server-sent events share, with errors in OpenAI's words. beat: what is sent while nothing arrives."""

    content_type = "text/event-stream; charset=utf-8"
    beat = b": waiting\n\n"

    def framed(self, event: object) -> bytes:
        """Return an event; one that has a "type" is sent under it as its name."""
        name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
        return name + b"data: " + msgspec.json.encode(event) + b"\n\n"

    def error(self, error: ApiError) -> object:
        """Return an error as the whole reply."""
        return error.body

    def failed(self, error: ApiError) -> object:
        """Return an error as the last event of a stream."""
        return error.body
