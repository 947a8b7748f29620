"""Issues and checks grants: a peer belongs to a swarm if a series of grants leads from the owner's key to its own.

    owner → peer                     the owner's own machines
    owner → invite key → peer        made by `dsd join`; the invite holds its key's secret, which never crosses a link
    … → peer → client                a member's command line tools, each with its own key

A stolen record is useless: the last grant names the peer's own key, which the connection authenticates.
"""

from collections.abc import Sequence

import msgspec

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.keys import SigningKey, is_signed_by, public_of
from dsd_p2p.types import PeerId
from dsd_p2p.wire.membership import Grant, OwnerChoice, Rekey, Revocation, Role

_GRANT_DOMAIN = b"dsd-p2p grant 1\0"
_REVOCATION_DOMAIN = b"dsd-p2p revocation 1\0"
_CHOICE_DOMAIN = b"dsd-p2p choice 1\0"
_REKEY_DOMAIN = b"dsd-p2p network key 1\0"
_encoder = msgspec.msgpack.Encoder()


def issue(issuer: SigningKey, subject: bytes, *, role: Role, expires_at_s: int, max_uses: int = 0) -> Grant:
    """Return a signed grant."""
    grant = Grant(
        issuer=issuer.public, subject=subject, role=role, expires_at_s=expires_at_s, max_uses=max_uses, signature=b""
    )
    return msgspec.structs.replace(grant, signature=issuer.sign(_signed_part(grant)))


def revoke(owner: SigningKey, swarm: bytes, subject: bytes) -> Revocation:
    """Return the owner's signed revocation of `subject`. swarm: the owner's public key."""
    return Revocation(subject=subject, signature=owner.sign(_REVOCATION_DOMAIN + swarm + subject))


def choose(owner: SigningKey, swarm: bytes, draft: str, made_at_ms: int) -> OwnerChoice:
    """Return the owner's signed choice for all members. swarm: the owner's public key."""
    choice = OwnerChoice(made_at_ms=made_at_ms, draft=draft)
    return msgspec.structs.replace(choice, signature=owner.sign(_signed_choice(choice, swarm)))


def is_choice_valid(choice: OwnerChoice, swarm: bytes) -> bool:
    """True if the swarm's owner signed the choice."""
    return is_signed_by(swarm, choice.signature, _signed_choice(choice, swarm))


def new_network_key(
    owner: SigningKey, swarm: bytes, key: bytes, revocations: Sequence[Revocation], made_at_ms: int
) -> Rekey:
    """Return the owner's signed new network key. swarm: the owner's public key."""
    rekey = Rekey(made_at_ms=made_at_ms, key=key, revocations=tuple(revocations))
    return msgspec.structs.replace(rekey, signature=owner.sign(_signed_rekey(rekey, swarm)))


def is_rekey_valid(rekey: Rekey, swarm: bytes) -> bool:
    """True if the swarm's owner signed the new network key."""
    return is_signed_by(swarm, rekey.signature, _signed_rekey(rekey, swarm))


def check_grants(grants: Sequence[Grant], *, swarm: bytes, peer: PeerId, now_s: float) -> Role:
    """Return the role of `peer` in the swarm whose owner's public key is `swarm`.

    Raises:
        RemoteProtocolError: the grants do not let it in; says what is wrong with them.
    """
    if not grants:
        raise RemoteProtocolError("grants", 0, "an invite to this swarm (its owner makes one with `dsd invite`)")
    if grants[0].issuer != swarm:
        raise RemoteProtocolError("invite", grants[0].issuer.hex()[:12], f"one of this swarm, {swarm.hex()[:12]}")
    if grants[-1].subject != public_of(peer):
        raise RemoteProtocolError("grant", grants[-1].subject.hex()[:12], "a grant for the peer that shows it")
    for index, grant in enumerate(grants):
        if not is_signed_by(grant.issuer, grant.signature, _signed_part(grant)):
            raise RemoteProtocolError("grant signature", grant.signature.hex()[:12], "its issuer's")
        if now_s >= grant.expires_at_s:
            raise RemoteProtocolError(
                "invite",
                f"expired {now_s - grant.expires_at_s:.0f} s ago",
                "one that has not expired (ask for a new one)",
            )
        if index:
            _check_link(grants[index - 1], grant, is_from_member=index >= 2)
    return grants[-1].role


def is_revocation_valid(revocation: Revocation, swarm: bytes) -> bool:
    """True if the swarm's owner signed the revocation."""
    return is_signed_by(swarm, revocation.signature, _REVOCATION_DOMAIN + swarm + revocation.subject)


def _check_link(before: Grant, grant: Grant, *, is_from_member: bool) -> None:
    if grant.issuer != before.subject:
        raise RemoteProtocolError("grant issuer", grant.issuer.hex()[:12], "the key that the previous grant names")
    if before.max_uses < 1:
        raise RemoteProtocolError(
            "grant", "one by a key that may not issue any", "a grant by a key that may let others in"
        )
    if grant.role is Role.STAGE and (before.role is Role.CLIENT or is_from_member):
        raise RemoteProtocolError("role", grant.role.value, "client, the only role that this issuer may grant")


def _signed_rekey(rekey: Rekey, swarm: bytes) -> bytes:
    return _REKEY_DOMAIN + swarm + _encoder.encode(msgspec.structs.replace(rekey, signature=b""))


def _signed_choice(choice: OwnerChoice, swarm: bytes) -> bytes:
    return _CHOICE_DOMAIN + swarm + _encoder.encode(msgspec.structs.replace(choice, signature=b""))


def _signed_part(grant: Grant) -> bytes:
    return _GRANT_DOMAIN + _encoder.encode(msgspec.structs.replace(grant, signature=b""))
