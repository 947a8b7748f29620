"""Connections to peers, dispatch of the messages that arrive on them, and membership of the swarm."""
