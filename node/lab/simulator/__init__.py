"""Simulator runs for the commands: scenarios, fitting, training, and the papers' figures."""
