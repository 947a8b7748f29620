"""The OpenAI-compatible HTTP door to a swarm."""
