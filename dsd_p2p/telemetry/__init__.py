"""What a swarm tells of itself: one schema for live and simulated runs."""
