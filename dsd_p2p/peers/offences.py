"""Remembers who broke the protocol: each time costs more, a few times in ten minutes cost the connection, then it is forgotten."""

from collections import OrderedDict
from dataclasses import dataclass

from dsd_p2p.types import PeerId

_FIRST_S, _MAX_S = 2.0, 600.0
"""How long a dropped peer is not read: breaking the protocol must not be the cheapest way to make us work."""

_BAN_S = 30.0
"""From this penalty on, a peer is not let in until it is over: after the fifth time."""

_FORGET_S = 600.0
_MAX_REMEMBERED = 1024


@dataclass(slots=True)
class _Record:
    count: int = 0
    at_s: float = 0.0
    until_s: float = 0.0


class Offences:
    """The offences of peers. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._records: OrderedDict[PeerId, _Record] = OrderedDict()

    def note(self, peer: PeerId, now_s: float) -> float:
        """Note an offence; return for how many seconds the peer is not to be read."""
        record = self._records.setdefault(peer, _Record())
        self._records.move_to_end(peer)
        while len(self._records) > _MAX_REMEMBERED:
            self._records.popitem(last=False)
        if now_s - record.at_s > _FORGET_S:
            record.count = 0
        record.count, record.at_s = record.count + 1, now_s
        penalty_s = min(_MAX_S, _FIRST_S * 2.0 ** (record.count - 1))
        record.until_s = now_s + penalty_s
        return penalty_s

    def ban_left_s(self, peer: PeerId, now_s: float) -> float:
        """Return for how many seconds more the peer is not let in; 0 if it is."""
        record = self._records.get(peer)
        if record is None or record.until_s - record.at_s < _BAN_S:
            return 0.0
        return max(0.0, record.until_s - now_s)
