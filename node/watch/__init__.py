"""Collects the events of a process, sends them on, and shows them on a dashboard."""
