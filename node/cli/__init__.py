"""The command `dsd`: flags, help, and one module for each command."""
