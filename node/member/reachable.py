"""Finds the addresses at which other peers can reach this machine."""

import ipaddress

import ifaddr

_EVERYWHERE = ("/ip4/0.0.0.0/", "/ip6/::/")


def reachable_addresses(listening: tuple[str, ...], announce: str) -> tuple[str, ...]:
    """Return up to 8 addresses to announce to other peers.

    `announce` comes first and loopback addresses come last. 0.0.0.0 and :: are replaced by every address of this
    machine, except those that only its own link knows.

    listening: multiaddrs that end in `/p2p/ID`.
    """
    found: list[str] = []
    for address in listening:
        everywhere = next((each for each in _EVERYWHERE if each in address), None)
        if everywhere:
            found += [address.replace(everywhere, f"/{everywhere[1:4]}/{ip}/") for ip in _own_ips(everywhere[1:4])]
        else:
            found.append(address)
    found.sort(key=lambda address: "/ip4/127." in address or "/ip6/::1/" in address)
    if announce and listening:
        peer = listening[0].rpartition("/p2p/")[2]
        found.insert(0, announce if "/p2p/" in announce else f"{announce}/p2p/{peer}")
    return tuple(dict.fromkeys(found))[:8]


def _own_ips(family: str) -> list[str]:
    ips = [ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    if family == "ip4":
        return [str(ip.ip) for ip in ips if ip.is_IPv4]
    found = [ip.ip[0] for ip in ips if ip.is_IPv6]
    return [ip for ip in found if not ipaddress.ip_address(ip).is_link_local]
