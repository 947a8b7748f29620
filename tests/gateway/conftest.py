"""One swarm for all tests of this folder, which run in one process (`xdist_group`)."""

import pytest
from upswarm import dsd_up


@pytest.fixture(scope="session")
def up():
    with dsd_up("--stages", "2") as swarm:
        yield swarm
