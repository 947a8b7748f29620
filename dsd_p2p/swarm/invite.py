"""Invites: strings `dsd1…` that let a peer into a swarm, made by `dsd invite` and used by `dsd join`."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import base58
import msgspec
from msgspec import Meta

from dsd_p2p.errors import ConfigError
from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.grants import issue
from dsd_p2p.types import Address, Digest, ModelName, Name
from dsd_p2p.wire.membership import MAX_GRANTS, Grant, KeyBytes, OwnerChoice, Role

_PREFIX = "dsd1"
_CHECKSUM_BYTES = 4
_MAX_CHARACTERS = 4096
_MEMBER_USES = 16
"""How many clients, its command line tools, a member may let in."""


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """All that a newcomer needs to join. It is secret, because whoever reads it can join.

    network_key: pre-shared key of the private network; without it no connection gets past its first bytes.
    seed: secret of the invite's own key, which the last of `grants` names.
    digest: the content of the model, so that a newcomer with another copy of it is told at once.
    choice: the owner's settings for all members. key_made_at_ms: when the network key was made; 0 for the first.
    """

    swarm: KeyBytes
    network_key: KeyBytes
    seed: KeyBytes
    grants: Annotated[tuple[Grant, ...], Meta(min_length=1, max_length=MAX_GRANTS)]
    bootstrap: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=8)]
    model: ModelName
    dtype: Name
    digest: Digest
    choice: OwnerChoice | None = None
    key_made_at_ms: Annotated[int, Meta(ge=0, le=1 << 50)] = 0

    def __str__(self) -> str:
        body = msgspec.msgpack.encode(self)
        return _PREFIX + base58.b58encode(body + _checksum(body)).decode()

    def admit(self, member: bytes) -> tuple[Grant, ...]:
        """Return the grants that let in the holder of the public key `member`."""
        last = self.grants[-1]
        made = issue(
            SigningKey(self.seed), member, role=last.role, expires_at_s=last.expires_at_s, max_uses=_MEMBER_USES
        )
        return (*self.grants, made)


def parse_invite(text: str) -> Invite:
    """Return the invite that the string holds.

    Raises:
        ConfigError: the string is not an invite, or is damaged.
    """
    text = text.strip()
    if not text.startswith(_PREFIX) or len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"invite: expected a string from `dsd invite`, which starts with {_PREFIX}, got {text[:16]!r}…"
        )
    try:
        decoded = base58.b58decode(text.removeprefix(_PREFIX))
        body, checksum = decoded[:-_CHECKSUM_BYTES], decoded[-_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise ConfigError("the invite is damaged: copy all of it again")
        return msgspec.msgpack.decode(body, type=Invite)
    except (ValueError, msgspec.DecodeError) as exc:
        raise ConfigError(
            f"the invite cannot be read: {exc}; ask for a new one made by the same version of dsd"
        ) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteTerms:
    """The terms of an invite: the role it grants, its expiry in seconds since 1970, and how many peers may use it."""

    role: Role
    expires_at_s: int
    max_uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmSettings:
    """What an invite says about the swarm.

    bootstrap: addresses of members. dtype: the stages' weights format. digest: the model's content.
    """

    network_key: bytes
    bootstrap: tuple[str, ...]
    model: str
    dtype: str
    digest: str
    choice: OwnerChoice | None = None
    key_made_at_ms: int = 0


def new_invite(owner: SigningKey, seed: bytes, terms: InviteTerms, swarm: SwarmSettings) -> Invite:
    """Return an invite signed by the swarm's owner. seed: 32 fresh random bytes."""
    granted = issue(
        owner,
        SigningKey(seed).public,
        role=terms.role,
        expires_at_s=terms.expires_at_s,
        max_uses=terms.max_uses,
    )
    return Invite(
        swarm=owner.public,
        network_key=swarm.network_key,
        seed=seed,
        grants=(granted,),
        bootstrap=swarm.bootstrap,
        model=swarm.model,
        dtype=swarm.dtype,
        digest=swarm.digest,
        choice=swarm.choice,
        key_made_at_ms=swarm.key_made_at_ms,
    )


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]
