"""Weights and what runs them: where a model comes from, one span of its layers, the cache, the target's view."""
