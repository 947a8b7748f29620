"""Holds the command `dsd`: flags, help, and one module per command."""
