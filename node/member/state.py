"""Stores what this machine knows of each swarm that it belongs to, in a folder that only the user can read.

identity      the peer's secret key
owner.key     the swarm owner's secret key, only on the machine that created the swarm
client-N      secret keys of commands; each is used by one command at a time
membership    network key, grants, bootstrap addresses, model
known         records and the owner's choice heard so far
authority     revocations and uses of invites, which must not be lost
invites       the invites that the owner has made, without their secrets
experience    measurements of routes and drafters, with which the next answer begins
control.sock  the socket at which the node daemon takes commands
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import base58
import msgspec
from filelock import FileLock, Timeout

from dsd_p2p.errors import CapacityError, ConfigError
from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.admission import Authority
from dsd_p2p.swarm.grants import check_grants, choose, issue
from dsd_p2p.swarm.invite import Invite
from dsd_p2p.transport.identity import SEED_BYTES, load_or_create_seed
from dsd_p2p.types import Address, Digest, ModelName, Name
from dsd_p2p.wire.membership import Grant, KeyBytes, MemberRecord, OwnerChoice, Role
from node.paths import state_dir

Stored = TypeVar("Stored")

_OWN_GRANT_S = 10 * 365 * 86400
_OWN_USES = 16
_MAX_CLIENTS = 16
_RECOVERY = "dsdowner1"


class StoredMembership(msgspec.Struct, frozen=True, array_like=True):
    """The keys and grants that let this machine into a swarm, with bootstrap addresses, the model and the owner's choice.

    key_made_at_ms: when the network key was made, in milliseconds since 1970; 0 for the first one.
    """

    swarm: KeyBytes
    network_key: KeyBytes
    grants: tuple[Grant, ...]
    bootstrap: tuple[Address, ...]
    model: ModelName
    dtype: Name
    digest: Digest
    choice: OwnerChoice | None = None
    key_made_at_ms: int = 0


class Known(msgspec.Struct, frozen=True, array_like=True):
    """Records heard so far. With them, a restarted peer finds other members without the bootstrap list."""

    records: tuple[MemberRecord, ...] = ()
    choice: OwnerChoice | None = None


class IssuedInvite(msgspec.Struct, frozen=True, array_like=True):
    """An invite that the owner has made, without its secret. subject: its public key."""

    subject: KeyBytes
    role: Role
    expires_at_s: int
    max_uses: int


class SwarmState:
    """The folder of one swarm. name: the user's name for the swarm, or a path."""

    def __init__(self, name: str) -> None:
        self.folder = Path(name) if "/" in name else state_dir() / name
        self.name = name

    @property
    def is_member(self) -> bool:
        """True when this machine belongs to the swarm."""
        return (self.folder / "membership").exists()

    @property
    def control_socket(self) -> Path:
        """Path of the socket at which the node daemon takes commands."""
        return self.folder / "control.sock"

    @property
    def experience(self) -> Path:
        """Path of the file with what was measured of routes and drafters."""
        return self.folder / "experience"

    @property
    def identity(self) -> Path:
        """Path of the file with the peer's secret key."""
        return self.folder / "identity"

    def node_key(self) -> SigningKey:
        """Return the peer's key, created on first use."""
        return self.key_of(self.identity)

    def owner_key(self) -> SigningKey:
        """Return the swarm owner's key.

        Raises:
            ConfigError: this machine did not create the swarm.
        """
        if not self.owner_file.exists():
            raise ConfigError(
                f"only the swarm's owner can do this, and {self.owner_file} is missing: use the machine that created the "
                "swarm, or bring the key here with `dsd recover`"
            )
        return self.key_of(self.owner_file)

    @property
    def owner_file(self) -> Path:
        """Path of the file with the swarm owner's secret key."""
        return self.folder / "owner.key"

    def recovery_key(self) -> str:
        """Return the owner's secret key as text, from which `recover_owner` makes the file again.

        Raises:
            ConfigError: this machine does not have it.
        """
        self.owner_key()
        seed = self.owner_file.read_bytes()
        return _RECOVERY + base58.b58encode_check(seed).decode()

    def recover_owner(self, recovery_key: str) -> None:
        """Store the owner's secret key.

        Raises:
            ConfigError: the text is no recovery key, or one of another swarm.
        """
        try:
            seed = base58.b58decode_check(recovery_key.removeprefix(_RECOVERY))
        except ValueError as exc:
            raise ConfigError(f"the recovery key is damaged, or none: it starts with {_RECOVERY}") from exc
        if len(seed) != SEED_BYTES or SigningKey(seed).public != self.membership().swarm:
            raise ConfigError(f"the recovery key is not that of swarm {self.name!r}")
        self._write_secret(self.owner_file, seed)

    def refuse_second(self) -> None:
        """Raise ConfigError if this machine already belongs to a swarm of this name."""
        if self.is_member:
            raise ConfigError(
                f"this machine already belongs to a swarm {self.name!r}: choose another name with --swarm"
            )

    def create(self, *, model: str, dtype: str, digest: str, draft: str = "auto") -> StoredMembership:
        """Create a new swarm owned by this machine. draft: the drafter of its requests.

        Raises:
            ConfigError: this machine already belongs to a swarm of this name.
        """
        self.refuse_second()
        self._make_folder()
        owner = self.key_of(self.folder / "owner.key")
        grant = issue(
            owner,
            self.node_key().public,
            role=Role.STAGE,
            expires_at_s=int(time.time()) + _OWN_GRANT_S,
            max_uses=_OWN_USES,
        )
        return self._store(
            StoredMembership(
                swarm=owner.public,
                network_key=secrets.token_bytes(32),
                grants=(grant,),
                bootstrap=(),
                model=model,
                dtype=dtype,
                digest=digest,
                choice=choose(owner, owner.public, draft, int(time.time() * 1e3)),
            )
        )

    def discard(self) -> None:
        """Leave a swarm that has just been created and never ran."""
        for name in ("membership", "owner.key", "known", "authority"):
            (self.folder / name).unlink(missing_ok=True)

    def join(self, invite: Invite, model: str = "") -> StoredMembership:
        """Accept an invite and store the membership.

        model: where this machine has the swarm's model, if not under the invite's name.

        Raises:
            ConfigError: this machine belongs to another swarm of this name.
            RemoteProtocolError: the invite has expired, or its grants are invalid.
        """
        if self.is_member and (mine := self.membership()).swarm != invite.swarm:
            raise ConfigError(
                f"{self.name!r} is the name of another swarm here ({mine.swarm.hex()[:12]}): choose another name with --swarm"
            )
        grants = invite.admit(self._made().node_key().public)
        check_grants(grants, swarm=invite.swarm, peer=self.node_key().peer, now_s=time.time())
        return self._store(
            StoredMembership(
                swarm=invite.swarm,
                network_key=invite.network_key,
                grants=grants,
                bootstrap=invite.bootstrap,
                model=model or invite.model,
                dtype=invite.dtype,
                digest=invite.digest,
                choice=invite.choice,
                key_made_at_ms=invite.key_made_at_ms,
            )
        )

    def change_network_key(self, key: bytes, made_at_ms: int) -> None:
        """Store the swarm's new network key, unless a later one is stored: the daemon and commands share the file.

        Raises:
            CapacityError: it cannot be written.
        """
        stored = self.membership()
        if made_at_ms <= stored.key_made_at_ms:
            return
        try:
            self._store(msgspec.structs.replace(stored, network_key=key, key_made_at_ms=made_at_ms))
        except OSError as exc:
            raise CapacityError(f"{self.folder / 'membership'}: {exc.strerror}") from exc

    def membership(self) -> StoredMembership:
        """Return the stored membership.

        Raises:
            ConfigError: this machine belongs to no swarm of this name.
        """
        if not self.is_member:
            raise ConfigError(
                f"this machine belongs to no swarm {self.name!r}: create one with `dsd create`, or join one with `dsd join INVITE`"
            )
        return self._read("membership", StoredMembership)

    @contextmanager
    def client(self) -> Iterator[tuple[Path, tuple[Grant, ...]]]:
        """Yield the file of a key that no other command uses now, and its grants. Our peer's key issues the last one.

        Raises:
            ConfigError: too many commands use the swarm at once.
        """
        grants = self.membership().grants
        for slot in range(_MAX_CLIENTS):
            identity = self.folder / f"client-{slot}"
            lock = FileLock(f"{identity}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            with lock:
                public = self.key_of(identity).public
                grant = issue(self.node_key(), public, role=Role.CLIENT, expires_at_s=grants[-1].expires_at_s)
                yield identity, (*grants, grant)
                return
        raise ConfigError(f"{_MAX_CLIENTS} commands on this machine already use the swarm: wait for one to end")

    def choice(self) -> OwnerChoice | None:
        """Return the owner's latest choice that this machine has heard of."""
        heard = [each for each in (self.membership().choice, self.known().choice) if each is not None]
        return max(heard, key=lambda each: each.made_at_ms, default=None)

    def known(self) -> Known:
        """Return the stored records; empty if they cannot be read."""
        try:
            return self._read("known", Known)
        except ConfigError:
            return Known()

    def remember(self, known: Known) -> None:
        """Store records of other members."""
        self._write("known", known)

    def issued(self) -> tuple[IssuedInvite, ...]:
        """Return the invites that were made here.

        Raises:
            ConfigError: they cannot be read.
        """
        return self._read("invites", tuple[IssuedInvite, ...]) if (self.folder / "invites").exists() else ()

    def issue(self, invite: IssuedInvite) -> None:
        """Remember an invite, without those that have expired."""
        valid = (each for each in self.issued() if each.expires_at_s > time.time())
        self._write("invites", (*valid, invite))

    def authority(self) -> Authority:
        """Return who was revoked and which invites were used.

        Raises:
            ConfigError: it cannot be read. Then nobody may be let in.
        """
        if not (self.folder / "authority").exists():
            return Authority()
        try:
            return msgspec.msgpack.decode((self.folder / "authority").read_bytes(), type=Authority)
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(
                f"{self.folder / 'authority'}: {exc}; without it, this machine would let revoked members in: restore the "
                "file, or delete it if another member can tell who was revoked"
            ) from exc

    def note(self, authority: Authority) -> None:
        """Store who was revoked and which invites were used.

        Raises:
            CapacityError: it cannot be written.
        """
        try:
            self._write("authority", authority)
        except OSError as exc:
            raise CapacityError(f"{self.folder / 'authority'}: {exc.strerror}: nobody new is let in") from exc

    def _made(self) -> "SwarmState":
        self._make_folder()
        return self

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(f"{self.folder}: {exc.strerror}; choose another place with --swarm /path") from exc

    def key_of(self, path: Path) -> SigningKey:
        """Return the key in a file, created on first use."""
        return SigningKey(load_or_create_seed(path))

    def _store(self, membership: StoredMembership) -> StoredMembership:
        self._write("membership", membership)
        return membership

    def _write(self, name: str, value: msgspec.Struct | tuple[msgspec.Struct, ...]) -> None:
        self._write_secret(self.folder / name, msgspec.msgpack.encode(value))

    def _write_secret(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        scratch.replace(path)

    def _read(self, name: str, kind: type[Stored]) -> Stored:
        try:
            return msgspec.msgpack.decode((self.folder / name).read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"{self.folder / name}: {exc}; join again with `dsd join INVITE`") from exc
