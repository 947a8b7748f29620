"""Runs the embedded MQTT broker on the loopback address, in a process of its own so that it does not slow decoding.

Run as `python -m node.watch.broker`. It prints its URL and exits when standard input ends.
"""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from dsd_p2p.errors import ConfigError
from node.parent import watch_parent

_START_TIMEOUT_S = 30.0


@asynccontextmanager
async def embedded_broker() -> AsyncIterator[str]:
    """Run a broker until the end of the block and yield its URL.

    Raises:
        ConfigError: the broker does not start.
    """
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "node.watch.broker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with trio.move_on_after(_START_TIMEOUT_S):
            line = b""
            while not line.endswith(b"\n"):
                chunk = await process.stdout.receive_some()
                if not chunk:
                    break
                line += chunk
        if not line.endswith(b"\n"):
            raise ConfigError(
                "the embedded MQTT broker did not start: use --mqtt none, or give your own with --mqtt URL"
            )
        yield line.decode().strip()
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(2):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with trio.CancelScope(shield=True):
                    await pipe.aclose()


async def _serve() -> None:
    from amqtt.broker import Broker

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}", "max_connections": 512}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    print(f"mqtt://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    watch_parent()
    asyncio.run(_serve())
