"""Decides which peer holds which layers, which peer coordinates a request, and which route serves it."""
