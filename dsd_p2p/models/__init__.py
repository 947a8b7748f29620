"""Finds, loads and runs models: their files, one span of their layers, the KV cache, and the logits."""
