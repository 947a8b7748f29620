"""Makes a member's own signed records."""

from collections.abc import Callable

from dsd_p2p.keys import SigningKey
from dsd_p2p.swarm.records import sign_record
from dsd_p2p.types import PeerInfo
from dsd_p2p.wire.membership import Grant, MemberRecord, MemberState, PeerProfile


class OwnRecord:
    """The maker of our records. unix: returns seconds since 1970. version: our software's."""

    def __init__(
        self, key: SigningKey, grants: tuple[Grant, ...], unix: Callable[[], float], version: str = ""
    ) -> None:
        self._key = key
        self._grants = grants
        self._unix = unix
        self._version = version
        self.incarnation = int(unix() * 1000)
        self.profile = PeerProfile()
        self.state = MemberState.JOINING

    def renewed(self, info: PeerInfo, known: MemberRecord | None) -> MemberRecord:
        """Return a signed record that is newer than `known`, our last known record."""
        sequence = max(int(self._unix() * 1000), known.sequence + 1 if known else 0)
        record = MemberRecord(
            info=info,
            incarnation=self.incarnation,
            sequence=sequence,
            state=self.state,
            grants=self._grants,
            profile=self.profile,
            version=self._version,
        )
        return sign_record(record, self._key)
