"""The daemon and the command line: the only place that picks implementations."""
