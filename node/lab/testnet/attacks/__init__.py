"""Attacks on a running peer, by the weakest who could try each: a stranger, a client, a member that went bad."""
