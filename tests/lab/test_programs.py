"""Commands that benchmarks run as users start them: what they print is waited for, and failures say why."""

import pytest
import trio

from dsd_p2p.errors import ModelError
from node.lab.benches.programs import ask, free_ports, open_programs


async def test_a_command_that_fails_says_why(tmp_path):
    async with open_programs(tmp_path) as programs:
        with pytest.raises(ModelError, match="unrecognized arguments"):
            await programs.run("models", "path", "no/such-model-anywhere", "--help-me")
        with pytest.raises(ModelError, match="did not start; its last line"):
            await programs.start("node", "--swarm", f"{tmp_path}/nothing/", until="/p2p/")


async def test_everything_ends_with_the_block(tmp_path):
    async with open_programs(tmp_path) as programs:
        (port,) = free_ports(1)
        program = await programs.start(*("sim", "run", "--help"), until="usage")
    assert program.process.returncode is not None
    with trio.fail_after(5), pytest.raises(ModelError, match="did not answer"):
        await ask(f"http://127.0.0.1:{port}/v1", "any", "?", 1)
