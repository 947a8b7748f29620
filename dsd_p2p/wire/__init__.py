"""The wire protocol: messages, frames and limits (docs/protocol.md)."""
