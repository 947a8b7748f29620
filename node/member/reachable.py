"""Finds the addresses at which other peers can reach this machine."""

import ifaddr


def reachable_addresses(listening: tuple[str, ...], announce: str) -> tuple[str, ...]:
    """Return up to 8 addresses to announce to other peers.

    `announce` comes first and loopback addresses come last. 0.0.0.0 is replaced by every address of this machine.

    listening: multiaddrs that end in `/p2p/ID`.
    """
    found: list[str] = []
    for address in listening:
        if "/ip4/0.0.0.0/" in address:
            found += [address.replace("/ip4/0.0.0.0/", f"/ip4/{ip}/") for ip in _own_ips()]
        else:
            found.append(address)
    found.sort(key=lambda address: "/ip4/127." in address)
    if announce and listening:
        peer = listening[0].rpartition("/p2p/")[2]
        found.insert(0, announce if "/p2p/" in announce else f"{announce}/p2p/{peer}")
    return tuple(dict.fromkeys(found))[:8]


def _own_ips() -> list[str]:
    return [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
