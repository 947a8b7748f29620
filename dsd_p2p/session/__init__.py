"""The core of the protocol, free of I/O: it takes messages and the time, and returns what to do."""
