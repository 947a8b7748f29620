"""Runs swarms in one process whose stages can be made to lie, to judge what audits catch."""
