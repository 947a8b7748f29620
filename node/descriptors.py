"""Raises this process's limit of open files: a default of 1,024 is less than the connections that it may hold."""

import resource
from contextlib import suppress

_WANTED = 16384


def raise_descriptors() -> None:
    """Raise the limit of open files as far as the system allows, to 16,384 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
