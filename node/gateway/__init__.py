"""The OpenAI-compatible HTTP backend to a swarm."""
