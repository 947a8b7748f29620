"""Cheap guesses at what the target will write."""
