"""A swarm in network namespaces of this machine, with real links between them, to be used and abused."""
