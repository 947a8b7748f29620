"""Keys, grants, invites, records and the registry of a swarm, without I/O, which is in `dsd_p2p.peers.membership`."""
