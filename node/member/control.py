"""Lets commands talk to the node daemon on this machine, over a socket: one JSON object in each direction."""

import hashlib
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from dsd_p2p.errors import ConfigError, DsdError, PeerTimeout
from dsd_p2p.wire.membership import OwnerChoice, Rekey, Revocation

logger = logging.getLogger(__name__)

_MAX_BYTES = 4 << 20
_TIMEOUT_S = 10.0
_MAX_NAME = 100


class Status(msgspec.Struct, tag="status"):
    """Asks the daemon for a `PeerReport`."""


class Stop(msgspec.Struct, tag="stop"):
    """Asks the daemon to let running sessions finish, for at most `drain_s` seconds, and to exit."""

    drain_s: float = 30.0


class Revoke(msgspec.Struct, tag="revoke"):
    """Asks the daemon to spread the owner's revocation."""

    revocation: Revocation


class Choose(msgspec.Struct, tag="choose"):
    """Asks the daemon to spread the owner's choice."""

    choice: OwnerChoice


class NewKey(msgspec.Struct, tag="rekey"):
    """Asks the daemon to spread the owner's new network key."""

    rekey: Rekey


Ask = Status | Stop | Revoke | Choose | NewKey


class MemberStatus(msgspec.Struct):
    """One member as the daemon sees it. Times are in seconds. invite: the id of the invite that let it in, if any."""

    peer: str
    state: str
    is_alive: bool
    role: str
    span: str
    addresses: list[str]
    round_trip_s: float | None
    is_relayed: bool
    num_sessions: int
    cache_bytes: int
    max_layers: int
    layer_s: float
    version: str
    age_s: float
    drafter: str
    draft_s: float
    invite: str


class PeerReport(msgspec.Struct, tag="node"):
    """The daemon's report on itself and its swarm.

    uses: for the id of each invite and member, the ids of those that it let in. revoked: ids of invites and members.
    """

    peer: str
    pid: int
    addresses: list[str]
    model: str
    dtype: str
    span: str
    state: str
    num_layers: int
    num_sessions: int
    cache_bytes: int
    num_refused: int
    num_frames: int
    members: list[MemberStatus]
    uncovered: list[int]
    draft: str
    refused_drafters: list[str]
    uses: dict[str, list[str]]
    revoked: list[str]


class Done(msgspec.Struct, tag="done"):
    """The daemon has done what was asked."""


class Refused(msgspec.Struct, tag="refused"):
    """The daemon cannot do what was asked. text: why."""

    text: str


Answer = PeerReport | Done | Refused

_ask_decoder = msgspec.json.Decoder(Ask)
_answer_decoder = msgspec.json.Decoder(Answer)


async def serve_control(path: Path, answer: Callable[[Ask], Awaitable[Answer]]) -> None:
    """Answer commands until cancelled.

    Raises:
        ConfigError: another node daemon of this swarm runs on this machine.
    """
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(path)))
    try:
        await trio.serve_listeners(lambda stream: _serve(stream, answer), [listener])
    finally:
        Path(_name(path)).unlink(missing_ok=True)  # noqa: ASYNC240 - one local name


def _listen(path: Path) -> socket.socket:
    name = _name(path)
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(name)
        raise ConfigError(
            "a node daemon of this swarm is already running here: stop it with `dsd node stop`, or use another --swarm"
        )
    Path(name).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    # Only our user may connect to the socket.
    old_mask = os.umask(0o177)
    try:
        listener.bind(name)
    finally:
        os.umask(old_mask)
    listener.listen(8)
    return listener


def _name(path: Path) -> str:
    """Return the socket's path: `path`, or one in a folder of ours under /tmp if `path` exceeds about 100 bytes.

    Raises:
        ConfigError: that folder is another user's.
    """
    if len(str(path)) < _MAX_NAME:
        return str(path)
    folder = Path(tempfile.gettempdir()) / f"dsd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} belongs to another user or is open to others: remove it, or use a shorter --swarm")
    return str(folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.sock")


async def _serve(stream: trio.SocketStream, answer: Callable[[Ask], Awaitable[Answer]]) -> None:
    with trio.move_on_after(120), suppress(trio.BrokenResourceError):
        async with stream:
            try:
                reply: Answer = await answer(_ask_decoder.decode(await _line(stream)))
            except (msgspec.DecodeError, DsdError) as exc:
                reply = Refused(text=str(exc))
            await stream.send_all(msgspec.json.encode(reply) + b"\n")


async def ask_node(path: Path, ask: Ask, timeout_s: float = _TIMEOUT_S) -> Answer:
    """Send a request to the node daemon on this machine and return its answer.

    Raises:
        ConfigError: no node daemon of this swarm runs here, or it refuses.
        PeerTimeout: it does not answer.
    """
    try:
        with trio.fail_after(timeout_s):
            async with await trio.open_unix_socket(_name(path)) as stream:
                await stream.send_all(msgspec.json.encode(ask) + b"\n")
                reply: Answer = _answer_decoder.decode(await _line(stream))
    except OSError as exc:
        raise ConfigError(
            f"no node daemon of this swarm is running on this machine: start it with `dsd node --swarm NAME` ({exc.strerror})"
        ) from exc
    except trio.TooSlowError:
        raise PeerTimeout(f"the node daemon did not answer within {timeout_s:g} s: see its log") from None
    if isinstance(reply, Refused):
        raise ConfigError(reply.text)
    return reply


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MAX_BYTES:
        chunk = await stream.receive_some(65536)
        if not chunk:
            break
        data += chunk
    return data
