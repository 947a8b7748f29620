"""The addresses that others can reach us at."""

import ifaddr


def reachable_addresses(listening: tuple[str, ...], announce: str) -> tuple[str, ...]:
    """Return what to tell others: `announce` first, then every own address in place of 0.0.0.0, this machine's loopback last.

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
