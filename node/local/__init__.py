"""Stage processes on this machine: start one, start several, emulate a network between them."""
