"""Shared by several tests."""

import random

import trio
from membership_keys import NOW_S, OWNER, invite, key
from swarms import TEST_MODEL

from dsd_p2p.peers.gatekeeper import SwarmGatekeeper
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.membership import Load, MembershipSettings, open_membership
from dsd_p2p.peers.rekeying import Rekeying
from dsd_p2p.peers.services import run_services
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.types import PeerInfo
from dsd_p2p.wire.membership import MemberState, PeerProfile

INTERVAL_S = 1.0


NUM_LAYERS = 30


def unix():
    return NOW_S + trio.current_time()


class Node:
    """One member: start it in a nursery, cancel `scope` to kill it."""

    def __init__(self, network, number, *, span=None, grants=None, bootstrap=(), interval_s=INTERVAL_S, belongs=True):
        self.key = key(number)
        self.network = network
        self.span = span
        self.belongs = belongs
        self.scope = trio.CancelScope()
        self.grants = invite(max_uses=20).admit(self.key.public) if grants is None else grants
        self.registry = Registry(me=self.key.peer, swarm=OWNER.public, interval_s=interval_s)
        self.bootstrap = [f"memory:{key(n).peer}" for n in bootstrap]
        self.rng = random.Random(number)

    def join(self, transport, load=Load):
        """Make links and membership; the object's `links` and `membership` from now on."""
        gatekeeper = SwarmGatekeeper(self.registry, self.grants, unix)
        self.links = PeerLinks(transport, self.info(), gatekeeper)
        settings = MembershipSettings(bootstrap=self.bootstrap, unix=unix, rng=self.rng)
        self.membership = open_membership(self.links, gatekeeper, self.key, settings, load)
        self.network_keys = []
        self.rekeying = Rekeying(self.membership, 0, lambda key, _made_at_ms: self.network_keys.append(key))

    @property
    def peer(self):
        return self.key.peer

    def info(self, span=None):
        span = span or self.span
        return PeerInfo(
            peer=self.peer,
            addresses=(f"memory:{self.peer}",),
            span=span,
            num_layers=NUM_LAYERS if span else 0,
            model=TEST_MODEL if span else None,
            max_positions=1024,
        )

    async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
        with self.scope:
            async with self.network.open(self.peer) as transport, trio.open_nursery() as nursery:
                self.join(transport)
                nursery.start_soon(run_services, self.links, [self.membership, self.rekeying])
                await trio.testing.wait_all_tasks_blocked()
                if self.belongs:
                    profile = PeerProfile(layer_us=1000, layer16_us=1500, max_layers=NUM_LAYERS if self.span else 0)
                    await self.membership.announce(self.info(), MemberState.SERVING, profile)
                task_status.started(self)
                await trio.sleep_forever()

    @property
    def alive(self):
        return {member.peer for member in self.registry.members() if member.is_alive}


async def settled(nodes, within_s=30):
    everybody = {node.peer for node in nodes}
    with trio.fail_after(within_s):
        while not all(node.alive == everybody for node in nodes):  # noqa: ASYNC110 - any of many changes
            await trio.sleep(0.05)
