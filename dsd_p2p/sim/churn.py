"""Makes peers and targets fail and come back."""

import random
from typing import Any

from dsd_p2p.errors import PeerDisconnected
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.machines import Machines, Unit
from dsd_p2p.sim.scenario import Churn as ChurnSettings
from dsd_p2p.sim.tally import Tally
from dsd_p2p.sim.target import TargetSession


class Churn:
    """The random failures of a run. The failed units' sessions are told, and the other units close the gaps."""

    def __init__(
        self, settings: ChurnSettings, machines: Machines[Any], clock: Clock, rng: random.Random, tally: Tally
    ) -> None:
        self._settings = settings
        self._machines = machines
        self._clock = clock
        self._rng = rng
        self._tally = tally

    def start(self) -> None:
        """Schedule every unit's first failure, if the scenario has failures."""
        if self._settings.up:
            for unit in self._machines.units:
                self._schedule_failure(unit)

    def _schedule_failure(self, unit: Unit) -> None:
        self._clock.after(self._rng.expovariate(1 / self._settings.up), self._fail, unit)

    def _fail(self, unit: Unit) -> None:
        if self._tally.is_over:
            return
        self._lose(self._machines.fail(unit), f"{unit.name} is down")
        self._clock.after(self._settings.notice, self._mend)
        self._clock.after(self._rng.expovariate(1 / self._settings.down), self._recover, unit)

    def _recover(self, unit: Unit) -> None:
        unit.is_up = True
        if not self._tally.is_over:
            self._schedule_failure(unit)

    def _mend(self) -> None:
        self._lose(self._machines.mend(), "a peer of the route loads other layers")

    def _lose(self, sessions: list[TargetSession], reason: str) -> None:
        for session in sessions:
            self._clock.after(self._settings.notice, session.client.lost, PeerDisconnected(reason), session)
