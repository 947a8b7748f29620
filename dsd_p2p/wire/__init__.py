"""What crosses a link: messages, frames, limits (docs/protocol.md)."""
