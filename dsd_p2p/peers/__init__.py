"""Connections between peers, the messages that arrive on them, and the swarm's membership."""
