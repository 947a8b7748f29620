"""Ollama's API: its chat and its list of models."""
