"""Holds one module per command. Its functions (`node.cli.table`) take the settings and return the exit code."""
