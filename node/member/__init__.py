"""A peer of a swarm: joins, takes layers, serves, leaves; and the commands' way to talk to it."""
