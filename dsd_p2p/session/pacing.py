"""Decides how much to speculate and when the next window may be sent."""

from dsd_p2p.session.request import RequestStats
from dsd_p2p.window.base import Decision, Mode, Observation, WindowPolicy
from dsd_p2p.window.tracker import Tracker

_UNMEASURED_IN_FLIGHT = 3
"""Windows that may follow the given text while no stage's pace is known.

More would only queue, and delay better windows until the end.
"""


class Pacing:
    """The policy's present decision, the measurements that it learns from, and the pace of one request's windows.

    Windows are sent one pace apart. A route without measurements has no pace yet; few windows may be in flight there.
    """

    def __init__(self, policy: WindowPolicy, tracker: Tracker, stats: RequestStats) -> None:
        self._policy = policy
        self._tracker = tracker
        self._stats = stats
        observation = tracker.observe()
        self.decision: Decision = policy.decide(observation)
        self._pace_s = observation.pace_s(self.decision.window_nodes)
        self.next_send_at_s = 0.0
        self._is_measured = bool(observation.stages)
        self._max_unmeasured = 0
        # Tokens committed right after a changed decision, or after the prompt, stem from earlier windows or from none.
        self._num_unattributed = 1
        self._committed_at_s = 0.0

    def __repr__(self) -> str:
        return f"{self.decision.kind}, a window every {self._pace_s * 1e3:.1f} ms"

    def observe(self) -> Observation:
        """Return the measurements that the policy decides by."""
        return self._tracker.observe()

    def decide(self, num_tokens: int, num_committed: int, now_s: float) -> None:
        """Report the tokens committed since the last verdict to the tracker, and let the policy decide again.

        num_tokens: length of the text. num_committed: how many of its tokens are new.
        """
        if num_committed:
            if self._num_unattributed <= 0:
                self._tracker.progress(self.decision, num_committed, now_s - self._committed_at_s)
            self._num_unattributed -= num_committed
            self._committed_at_s = now_s
        observation = self._tracker.observe()
        previous, self.decision = self.decision, self._policy.decide(observation)
        if self.decision.kind != previous.kind:
            self._num_unattributed = 1
        if self.decision != previous:
            self._stats.note_decision(num_tokens, self.decision)
        self._pace_s = observation.pace_s(self.decision.window_nodes)

    def may_send(self, num_in_flight: int, num_sent_nodes: int) -> bool:
        """Return True if only the pace holds back a window in continuous mode."""
        decision = self.decision
        return (
            decision.mode is Mode.CONTINUOUS
            and num_in_flight < decision.max_in_flight
            and (self._is_measured or num_in_flight < self._max_unmeasured)
            and num_sent_nodes + decision.window_nodes <= decision.max_nodes
        )

    def opened(self, num_in_flight: int) -> None:
        """Note that the given text is in flight in `num_in_flight` windows."""
        self._max_unmeasured = num_in_flight + _UNMEASURED_IN_FLIGHT

    def sent(self, now_s: float) -> None:
        """Note that a window was sent now."""
        self.next_send_at_s = now_s + self._pace_s

    def measured(self) -> None:
        """Note that a verdict has reported the stages' times, so that the pace is known."""
        self._is_measured = True
