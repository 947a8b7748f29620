"""Implements a stage: it admits sessions, runs its span over their windows, and parks finished texts."""
