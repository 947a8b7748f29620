"""`from dsd_p2p import Swarm`: under asyncio, under trio, and without either, on real processes."""

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import time

import pytest
import trio
from upswarm import dsd_up

from dsd_p2p import Swarm, SyncSwarm
from dsd_p2p.errors import ConfigError, DsdError, LocalProtocolError

PROMPT = "What is the capital of France?"

pytestmark = [
    pytest.mark.xdist_group("gateway"),
    # py-libp2p leaves the sockets of a host that stops to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _collect():
    """So that what is left to the garbage collector is found here, and not in another test; a thread may still be ending."""
    yield
    deadline_s = time.monotonic() + 2
    gc.collect()
    while time.monotonic() < deadline_s and any(_is_open(each) for each in gc.get_objects()):
        time.sleep(0.05)
        gc.collect()


def _is_open(each: object) -> bool:
    return type(each) is socket.socket and each.fileno() != -1


@pytest.fixture(scope="module")
def address():
    with dsd_up("--stages", "2", "--mqtt", "none") as up:
        yield up.address


def test_the_same_words_with_and_without_an_event_loop(address):
    async def write() -> str:
        async with Swarm(address) as swarm:
            return "".join([token.text async for token in swarm.generate(PROMPT, max_tokens=16)])

    with SyncSwarm(address) as swarm:
        text = "".join(token.text for token in swarm.generate(PROMPT, max_tokens=16))
        assert "Paris" in text
        conversation = [{"role": "user", "content": PROMPT}]
        assert "".join(token.text for token in swarm.generate(conversation, max_tokens=16)) == text
        tokens = [token.id for token in swarm.generate([504, 2365, 6354], max_tokens=8)]
        assert len(tokens) == 8
        sampled = [[t.id for t in swarm.generate(PROMPT, max_tokens=8, temperature=1.0, seed=s)] for s in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
    assert asyncio.run(write()) == text
    assert trio.run(write) == text


def test_answers_end_early_side_by_side_and_with_their_reader(address):
    async def first(swarm: Swarm, count: int) -> int:
        with trio.fail_after(60):
            num_tokens = 0
            answer = swarm.generate("Count to a thousand.", max_tokens=900)
            async for _ in answer:
                num_tokens += 1
                if num_tokens == count:
                    break
            await answer.aclose()
            return num_tokens

    async def main() -> None:
        async with Swarm(address, draft="ngram") as swarm, trio.open_nursery() as nursery:
            for count in (3, 5, 7):
                nursery.start_soon(first, swarm, count)
        before = threading.active_count()
        assert before < 40

    trio.run(main)

    async def cancelled() -> None:
        async with Swarm(address, draft="ngram") as swarm:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    async for _ in swarm.generate("Count to a thousand.", max_tokens=900):
                        pass
            # The swarm is usable after it.
            assert [token async for token in swarm.generate(PROMPT, max_tokens=2)]

    asyncio.run(cancelled())


def test_mistakes_are_typed_errors(address):
    with pytest.raises(DsdError):
        SyncSwarm("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWBerHNop4atP1ZjQnhMZdK67hWx8YW349cFcdrMp26yXb").__enter__()
    with pytest.raises(ConfigError, match="dtype"):
        SyncSwarm(address, dtype="bfloat16").__enter__()
    swarm = SyncSwarm(address)
    with pytest.raises(LocalProtocolError, match="with"):
        next(swarm.generate(PROMPT))
    with swarm:
        with pytest.raises(ConfigError, match="context"):
            next(swarm.generate(PROMPT, max_tokens=10**6))
        for wrong in ({"seed": -1}, {"top_k": -1}, {"top_p": 0.0}, {"temperature": float("nan")}):
            with pytest.raises(ConfigError, match=r"(temperature|seed|top_p|top_k) is "):
                next(swarm.generate(PROMPT, **wrong))
        with pytest.raises(LocalProtocolError, match="failed"):
            next(swarm.generate(PROMPT, max_tokens=None))
        # What was wrong with one has cost the others nothing.
        assert next(swarm.generate(PROMPT, max_tokens=2)).text
        with pytest.raises(ConfigError, match="prompt"):
            next(swarm.generate(["a", 1]))
    with pytest.raises(LocalProtocolError, match="closed"):
        next(swarm.generate(PROMPT))


def test_the_name_costs_nothing_until_it_is_used():
    code = "import sys, dsd_p2p, dsd_p2p.sim.clock; assert not {'torch', 'libp2p', 'trio'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
