"""Attacks a peer as strangers and hostile members could: half-open connections, junk, and randomly corrupted frames.

Run as `python -m node.lab.testnet.attacker ADDRESS SWARM_FOLDER FRAMES HANDSHAKES SEED`. It prints the numbers of
handshakes and frames that it sent.
"""

import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import trio

from dsd_p2p.errors import DsdError, PeerError
from dsd_p2p.transport.base import Lost
from dsd_p2p.transport.libp2p import Libp2pTransport, open_libp2p
from dsd_p2p.types import MAX_TOKEN, ComputeFormat, ModelKey, PeerId, PeerInfo, Span, TextRequest
from dsd_p2p.wire.codec import MAX_FRAME_BYTES, encode
from dsd_p2p.wire.membership import Heartbeat, Members
from dsd_p2p.wire.messages import (
    Ask,
    Cancel,
    CloseSession,
    Hello,
    Ping,
    Recompute,
    Reveal,
    Verdict,
    Window,
)
from dsd_p2p.wire.version import PROTOCOL_ID, PROTOCOL_VERSION
from node.member.state import SwarmState

_BURST = 400
_NAME = b"attacker"
_KEY = ModelKey(digest="x", weights="float32", compute=ComputeFormat.FLOAT32)
_TEXT = TextRequest(max_tokens=1)
_STARTS = (
    b"",
    b"\x13/multistream/1.0.0\n",
    bytes(8),
    b"GET / HTTP/1.1\r\n\r\n",
    bytes((0x80, 0x80, 0x80, 0x80, 0x01)),
)
_HELD = 64


def main() -> None:
    """Run the attack, then print what was sent."""
    address, folder, frames, handshakes, seed = sys.argv[1:6]
    rng = random.Random(int(seed))  # noqa: S311 - what is bent how
    num_handshakes = _handshakes(address, int(handshakes), rng)
    num_frames = trio.run(_frames, address, SwarmState(folder), int(frames), rng)
    print(num_handshakes, num_frames, flush=True)


def _handshakes(address: str, count: int, rng: random.Random) -> int:
    """Open connections, send a broken start on each, and keep some of them open."""
    parts = address.split("/")
    held: list[socket.socket] = []
    for _ in range(count):
        with suppress(OSError):
            connection = socket.create_connection((parts[2], int(parts[4])), timeout=2)
            start = rng.choice((*_STARTS, rng.randbytes(rng.randrange(400))))
            held.append(connection)
            connection.sendall(start)
        while len(held) > _HELD:
            held.pop(0).close()
        if rng.random() < 0.02:
            time.sleep(0.05)
    for connection in held:
        connection.close()
    return count


def _honest() -> list[bytes]:
    """Return well-formed messages about sessions that do not exist and texts that cannot exist."""
    messages = (
        Window(
            session=_NAME,
            epoch=0,
            window=1,
            root=(0, -1),
            first_node=0,
            tokens=(1, 2),
            parents=(-1, 0),
            positions=(0, 1),
        ),
        Verdict(session=_NAME, epoch=0, window=0, start_pos=3, tokens=(1,), settled=(-1,)),
        Cancel(session=_NAME, epoch=1),
        CloseSession(session=_NAME, epoch=1),
        Ping(nonce=1),
        Heartbeat(beat=1, view=bytes(8)),
        Members(),
        Reveal(session=_NAME, start=0, end=5, at=(0, -1)),
        Recompute(request=_NAME, span=Span(0, 1), model=_KEY, tokens=(1, 2, 3), text=_TEXT, num_prompt=1),
        Ask(
            request=_NAME,
            prompt=(MAX_TOKEN,),
            text=_TEXT,
            idle_timeout_s=1,
            deadline_s=1,
        ),
    )
    return [encode(message) for message in messages]


def _bent(rng: random.Random) -> Iterator[bytes]:
    """Yield frames of every kind, one in two hundred corrupted.

    The rest stay intact, so that they reach code that a corrupted frame never reaches.
    """
    honest = _honest()
    while True:
        frame = bytearray(rng.choice(honest))
        if rng.random() < 0.005:
            match rng.randrange(3):
                case 0:
                    frame = bytearray(rng.randbytes(rng.randrange(200)))
                case 1:
                    frame = frame[: rng.randrange(len(frame) + 1)]
                case _:
                    for _ in range(rng.randrange(1, 6)):
                        frame[rng.randrange(len(frame))] = rng.randrange(256)
        yield bytes(frame)


async def _frames(address: str, state: SwarmState, count: int, rng: random.Random) -> int:
    """Send frames as a hostile member. It is disconnected again and again, and reconnects each time."""
    num_sent = 0
    stored = state.membership()
    with state.client() as (identity, grants), tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "identity"
        copy.write_bytes(identity.read_bytes())
        copy.chmod(0o600)
        async with open_libp2p(
            identity=copy,
            listen="/ip4/127.0.0.1/tcp/0",
            protocol=PROTOCOL_ID,
            max_frame_bytes=MAX_FRAME_BYTES,
            network_key=stored.network_key,
        ) as transport:
            hello = Hello(version=PROTOCOL_VERSION, sender=PeerInfo(peer=transport.peer, addresses=()), grants=grants)
            frames = _bent(rng)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_drain, transport)
                while num_sent < count:
                    with suppress(DsdError):
                        peer = await transport.connect(address, 10)
                        transport.admit(peer)
                        await transport.send(peer, encode(hello))
                        num_sent += await _burst(transport, peer, frames, min(_BURST, count - num_sent))
                nursery.cancel_scope.cancel()
    return num_sent


async def _burst(transport: Libp2pTransport, peer: PeerId, frames: Iterator[bytes], count: int) -> int:
    sent = 0
    for _ in range(count):
        try:
            await transport.send(peer, next(frames))
        except PeerError:
            break
        sent += 1
    return sent


async def _drain(transport: Libp2pTransport) -> None:
    while True:
        event = await transport.receive()
        if isinstance(event, Lost):
            continue


if __name__ == "__main__":
    main()
