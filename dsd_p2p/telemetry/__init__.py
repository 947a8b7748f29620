"""Telemetry of a swarm, in one schema for live and simulated runs."""
