"""Picks the target's tokens, in exact and in relaxed mode."""
