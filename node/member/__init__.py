"""Runs a peer of a swarm, from joining to leaving, and lets commands talk to it."""
