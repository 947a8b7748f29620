"""Starts one or several stage processes on this machine and emulates a network between them."""
