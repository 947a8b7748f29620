"""The core of the protocol, free of I/O: given messages and the time, it returns what to do."""
