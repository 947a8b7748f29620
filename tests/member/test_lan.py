"""Multicast DNS on this machine's loopback: those with our network key are found, others are not."""

import pytest
import trio
import trio.lowlevel

from node.member import lan

KEY, OTHER_KEY = bytes(range(32)), bytes(32)


def address_of(peer):
    return f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}"


def neighbours(peer, found, network_key=KEY, addresses=None):
    return lan.neighbours(
        network_key=network_key,
        peer=peer,
        addresses=addresses or (address_of(peer),),
        found=found,
        interfaces=["127.0.0.1"],
    )


async def test_members_find_each_other_and_nobody_else():
    found = {"12D3a": set(), "12D3b": set(), "12D3stranger": set()}
    async with (
        neighbours("12D3a", found["12D3a"].add),
        neighbours("12D3stranger", found["12D3stranger"].add, OTHER_KEY),
        neighbours("12D3b", found["12D3b"].add, addresses=(address_of("12D3b"), "junk", "x" * 400)),
    ):
        with trio.fail_after(30):
            while not (found["12D3a"] and found["12D3b"]):  # noqa: ASYNC110 - reports come from another thread
                await trio.sleep(0.05)
    assert found == {"12D3a": {address_of("12D3b")}, "12D3b": {address_of("12D3a")}, "12D3stranger": set()}


async def test_a_machine_without_multicast_goes_on_without(monkeypatch, caplog):
    def fail(**_options):
        raise OSError("no such device")

    monkeypatch.setattr(lan, "Zeroconf", fail)
    async with neighbours("12D3a", pytest.fail):
        await trio.lowlevel.checkpoint()
    assert "multicast DNS unavailable" in caplog.text
