"""Simulator runs for the commands: scenarios, fitting, training, reproduction of the papers."""
