"""The gateway: an OpenAI-compatible HTTP API to a swarm."""
