"""Runs recurrent layers (linear attention, Mamba, short convolutions) over trees of nodes, without a state per node."""
