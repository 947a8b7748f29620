"""Reports the status of simulated peers, as live peers report theirs."""

from typing import Any

from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.machines import Machines, Place
from dsd_p2p.sim.tally import Tally
from dsd_p2p.telemetry.events import PeerStatus
from dsd_p2p.telemetry.watch import Sink

_INTERVAL_S = 1.0
"""Time between two reports of a peer, as in a live swarm."""


class StageStatuses:
    """The reporter of every peer's status, once a second until the run is over."""

    def __init__(self, machines: Machines[Any], clock: Clock, tally: Tally, tell: Sink) -> None:
        self._machines = machines
        self._clock = clock
        self._tally = tally
        self._tell = tell
        self._busy_s: dict[str, float] = {}

    def start(self) -> None:
        """Schedule the first report, one interval from now."""
        self._clock.after(_INTERVAL_S, self._report)

    def _report(self) -> None:
        for place in self._machines.places():
            self._tell(self._status(place))
        if not self._tally.is_over:
            self._clock.after(_INTERVAL_S, self._report)

    def _status(self, place: Place) -> PeerStatus:
        total_s = sum(stage.busy_s for stage in place.stages)
        busy_s, self._busy_s[place.peer] = total_s - self._busy_s.get(place.peer, 0.0), total_s
        return PeerStatus(
            at_s=self._clock.now_s,
            peer=place.peer,
            is_online=place.is_up,
            roles=("stage",),
            model="simulated",
            first=place.span.first,
            last=place.span.last,
            num_layers=place.num_layers,
            state="serving" if place.is_up else "down",
            num_sessions=place.num_sessions,
            queue=sum(stage.num_waiting for stage in place.stages),
            busy_share=max(0.0, min(1.0, busy_s / _INTERVAL_S)),
            num_passes=sum(stage.num_passes for stage in place.stages),
            num_windows=sum(stage.num_served for stage in place.stages),
        )
