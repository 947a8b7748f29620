"""Shared by several tests."""

from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.invite import Invite, InviteTerms, SwarmSettings, new_invite
from dsd_p2p.wire.membership import Role

NOW_S = 1_800_000_000


OWNER = SigningKey(b"o" * 32)


STRANGER = SigningKey(b"s" * 32)


def key(number: int) -> SigningKey:
    return SigningKey(bytes([number]) * 32)


def invite(*, role=Role.STAGE, expires_at_s=NOW_S + 100, max_uses=2, owner=OWNER, seed=b"i" * 32) -> Invite:
    return new_invite(
        owner,
        seed,
        InviteTerms(role=role, expires_at_s=expires_at_s, max_uses=max_uses),
        SwarmSettings(
            network_key=b"n" * 32,
            bootstrap=("/ip4/127.0.0.1/tcp/4001/p2p/x",),
            model="smollm2-135m",
            dtype="float32",
            digest="",
        ),
    )
