"""Runs transformers' layers over buffers that never move, so that a GPU can replay a whole pass as one graph."""
