"""Runs the layers of Llama-like models in int8: as fast as the machine can, and a row's bits depend on nothing beside it."""
