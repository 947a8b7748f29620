"""Emulates a wide-area network on one machine, with real TCP between network namespaces. Needs root and iproute2.

Every host is a namespace with one TUN device. One process, the forwarder, reads the packets of all hosts. It writes
each packet into its destination's device when the link between the two hosts would have delivered it. This needs no
kernel module for emulated delay.

`python -m node.local.netlab LATENCY_S JITTER_S BANDWIDTH_BPS NAMESPACE...` runs the forwarder. It reads link changes
(`LinkChange`) from standard input.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel, LinkState

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MTU = 9000
_NAMESPACES = Path("/run/netns")
_START_TIMEOUT_S = 10.0


def namespace(host: int) -> str:
    """Return the name of a host's network namespace. The name contains the process id, so processes do not clash."""
    return f"dsd{os.getpid()}-{host}"


def address(host: int) -> str:
    """Return a host's IPv4 address."""
    return f"10.78.0.{host + 1}"


class LinkChange(msgspec.Struct, frozen=True, kw_only=True):
    """New properties of the link from host `a` to host `b`, one way and without jitter.

    loss: share of packets to drop. is_up: False drops all.
    """

    a: int
    b: int
    latency_s: float
    bandwidth_bps: float = 0.0
    loss: float = 0.0
    is_up: bool = True


class Netlab:
    """The running network. Its links can be changed."""

    def __init__(self, forwarder: "subprocess.Popen[bytes]") -> None:
        self._forwarder = forwarder

    def change(self, change: LinkChange) -> None:
        """Change one direction of a link."""
        assert self._forwarder.stdin is not None
        self._forwarder.stdin.write(msgspec.json.encode(change) + b"\n")
        self._forwarder.stdin.flush()


@contextmanager
def netlab(num_hosts: int, link: LinkModel) -> Iterator[Netlab]:
    """Make `num_hosts` namespaces, linked to each other by `link`, and keep this thread in host 0's until the end.

    Raises:
        ConfigError: we are not root, or the kernel or iproute2 refuses.
    """
    if os.geteuid() != 0:
        raise ConfigError("network namespaces need root: run as root, or use emulated links")
    if not 1 <= num_hosts <= 200:
        raise ConfigError(f"{num_hosts} hosts: expected 1 to 200")
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    forwarder = None
    try:
        for host in range(num_hosts):
            _ip("netns", "add", namespace(host))
            _ip("-n", namespace(host), "link", "set", "lo", "up")
        forwarder = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [
                *(sys.executable, "-m", "node.local.netlab"),
                *(str(value) for value in (link.latency_s, link.jitter_s, link.bandwidth_bps)),
                *(namespace(host) for host in range(num_hosts)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _await_ready(forwarder)
        for host in range(num_hosts):
            inside = ("-n", namespace(host))
            _ip(*inside, "addr", "add", f"{address(host)}/24", "dev", "lab")
            _ip(*inside, "link", "set", "lab", "up", "mtu", str(_MTU), "txqueuelen", "2000")
        enter_namespace(namespace(0))
        yield Netlab(forwarder)
    finally:
        _set_namespace(home)
        os.close(home)
        if forwarder is not None:
            forwarder.kill()
            forwarder.wait()
            for pipe in (forwarder.stdin, forwarder.stdout):
                if pipe is not None:
                    pipe.close()
        for host in range(num_hosts):
            if (_NAMESPACES / namespace(host)).exists():
                _ip("netns", "del", namespace(host))


def enter_namespace(name: str) -> None:
    """Move this thread, and the processes it starts, into a network namespace.

    Raises:
        ConfigError: no namespace has this name, or we may not enter it.
    """
    try:
        descriptor = os.open(_NAMESPACES / name, os.O_RDONLY)
    except OSError as exc:
        raise ConfigError(f"network namespace {name}: {exc.strerror}") from exc
    try:
        _set_namespace(descriptor)
    finally:
        os.close(descriptor)


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise ConfigError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)  # noqa: S603, S607 - iproute2
    except FileNotFoundError as exc:
        raise ConfigError("network namespaces need iproute2: apt-get install iproute2") from exc
    except subprocess.TimeoutExpired as exc:
        raise ConfigError(f"ip {' '.join(arguments)} did not end: use emulated links instead") from exc
    except subprocess.CalledProcessError as exc:
        raise ConfigError(f"ip {' '.join(arguments)}: {exc.stderr.decode(errors='replace').strip()}") from exc


def _await_ready(forwarder: "subprocess.Popen[bytes]") -> None:
    assert forwarder.stdout is not None
    is_ready, _, _ = select.select([forwarder.stdout], [], [], _START_TIMEOUT_S)
    if not is_ready or forwarder.stdout.readline() != b"ready\n":
        raise ConfigError("the packet forwarder did not start: does this kernel have /dev/net/tun?")


# The forwarder


def main() -> None:
    """Forward packets until standard input ends."""
    latency_s, jitter_s, bandwidth_bps = (float(value) for value in sys.argv[1:4])
    link = LinkModel(latency_s=latency_s, jitter_s=jitter_s, bandwidth_bps=bandwidth_bps)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    devices = [_open_device(name) for name in sys.argv[4:]]
    _set_namespace(home)
    os.set_blocking(0, False)
    os.write(1, b"ready\n")
    _forward(devices, link)


def _open_device(name: str) -> int:
    enter_namespace(name)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"lab", _IFF_TUN | _IFF_NO_PI))
    return device


class _Links:
    """The current state of every link, one entry per direction."""

    def __init__(self, link: LinkModel) -> None:
        self._link = link
        self._states: dict[tuple[int, int], LinkState] = {}
        self._changes: dict[tuple[int, int], LinkChange] = {}
        self._rng = random.Random(0)  # noqa: S311 - jitter and loss
        self._text = b""

    def arrival_s(self, a: int, b: int, num_bytes: int, now_s: float) -> float | None:
        """Return when a packet from host `a` arrives at host `b`; None if it is lost."""
        change = self._changes.get((a, b))
        if change is not None and (not change.is_up or self._rng.random() < change.loss):
            return None
        state = self._states.setdefault((a, b), LinkState(self._link))
        return state.send(now_s=now_s, num_bytes=num_bytes, rng=self._rng)

    def listen(self) -> None:
        """Read changes from standard input. Exit when it ends."""
        text = os.read(0, 65536)
        if not text:
            os._exit(0)
        *lines, self._text = (self._text + text).split(b"\n")
        for line in lines:
            change = msgspec.json.decode(line, type=LinkChange)
            self._changes[change.a, change.b] = change
            model = LinkModel(latency_s=change.latency_s, bandwidth_bps=change.bandwidth_bps)
            self._states[change.a, change.b] = LinkState(model)


def _forward(devices: list[int], link: LinkModel) -> None:
    """Deliver every IPv4 packet to its destination's device at the time its link would."""
    links = _Links(link)
    host_of = {device: host for host, device in enumerate(devices)}
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([0, *devices], [], [], left_s)
        now_s = time.monotonic()
        for device in readable:
            if device == 0:
                links.listen()
                continue
            packet = os.read(device, 65536)
            target = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1
            if 0 <= target < len(devices):
                due_s = links.arrival_s(host_of[device], target, len(packet), now_s)
                if due_s is not None:
                    number += 1
                    heapq.heappush(waiting, (due_s, number, target, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            # Like a real device, one that is full or not up yet drops packets.
            with suppress(OSError):
                os.write(devices[target], packet)


if __name__ == "__main__":
    main()
