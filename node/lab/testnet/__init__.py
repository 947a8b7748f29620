"""A test swarm in network namespaces of this machine, with real links between them."""
