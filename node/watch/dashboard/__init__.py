"""`dsd top`: a swarm on a terminal."""
