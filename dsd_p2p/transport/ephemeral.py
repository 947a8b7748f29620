"""Opens a libp2p host for one run, through which a coordinator on this machine reaches its stages."""

import random
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from dsd_p2p.netmodel import LinkModel
from dsd_p2p.transport.base import Transport
from dsd_p2p.transport.emulated import emulate
from dsd_p2p.transport.libp2p import open_libp2p
from dsd_p2p.wire.codec import MAX_FRAME_BYTES
from dsd_p2p.wire.version import PROTOCOL_ID


@asynccontextmanager
async def open_ephemeral(link: LinkModel, host: str = "127.0.0.1") -> AsyncIterator[Transport]:
    """Open a libp2p host on `host` with an identity for this run only."""
    with tempfile.TemporaryDirectory(prefix="dsd-coordinator-") as scratch:
        async with open_libp2p(
            identity=Path(scratch) / "identity",
            listen=f"/ip4/{host}/tcp/0",
            protocol=PROTOCOL_ID,
            max_frame_bytes=MAX_FRAME_BYTES,
        ) as inner:
            rng = random.Random(secrets.randbits(64))  # noqa: S311 - jitter of an emulated link
            async with emulate(inner, link, rng) as transport:
                yield transport
