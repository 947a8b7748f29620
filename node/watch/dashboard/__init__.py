"""Implements `dsd top`, the dashboard of a swarm in a terminal."""
