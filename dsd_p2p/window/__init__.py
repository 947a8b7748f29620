"""Policies that decide from measurements how much to speculate."""
