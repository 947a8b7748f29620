"""Who belongs to a swarm and who is alive: keys, grants, invites, records, registry. No I/O: that is `pipeline.membership`."""
