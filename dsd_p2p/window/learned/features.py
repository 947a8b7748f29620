"""Turns an observation into the network's inputs: numbers around one, without units."""

import math

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.window.base import Decision, Mode, Observation

_RANKS = (1, 2, 4, 12)
_MODES = (Mode.PLAIN, Mode.SYNC, Mode.CONTINUOUS)

NAMES = (
    "log_traversal",
    "links",
    "slowest",
    "stages",
    "log_slowest_8",
    "log_slowest_16",
    "draft",
    "log_draft_per_pass",
    "queue",
    "log_sharing",
    *(f"hits_{count}" for count in _RANKS),
    "confidence",
    "log_outcomes",
    "log_tpot",
    "previous_depth",
    "previous_width",
    "previous_nodes",
    "previous_flight",
    *(f"previous_{mode}" for mode in _MODES),
)
"""Names of the features, in order. Times are relative to a traversal of one node unless the name says otherwise.
hits_n: how often the target's token is among the first n candidates."""

NUM_FEATURES = len(NAMES)


def features(observation: Observation, previous: Decision) -> NDArray[np.float32]:
    """Return float32 `[NUM_FEATURES]`. The observation must have stages; `previous` is the decision now in force."""
    traversal_s = max(observation.traversal_s(1), 1e-6)
    slowest_s = max(observation.slowest_stage_s(1), 1e-6)
    draft_s = max(observation.draft.at(1), 1e-6)
    rates = observation.hit_rate_by_rank
    measured = observation.measured.get(previous.kind)
    tpot_s = 1 / measured.tokens_per_s if measured is not None and measured.tokens_per_s > 0 else traversal_s
    return np.array(
        [
            math.log(traversal_s),
            observation.links_s / traversal_s,
            slowest_s / traversal_s,
            sum(stage.at(1) for stage in observation.stages) / traversal_s,
            _bounded_log(observation.slowest_stage_s(8) / slowest_s),
            _bounded_log(observation.slowest_stage_s(16) / slowest_s),
            min(draft_s / traversal_s, 4.0),
            _bounded_log(draft_s / slowest_s),
            min(observation.queue_s / traversal_s, 4.0),
            _bounded_log(observation.num_sharing),
            *(sum(rates[:count]) for count in _RANKS),
            observation.confidence,
            math.log1p(observation.num_outcomes) / 4,
            _bounded_log(tpot_s / traversal_s),
            previous.depth / 12 if previous.mode is Mode.SYNC else 1.0,
            previous.width / 4,
            math.log2(previous.window_nodes) / 4,
            math.log2(previous.max_in_flight) / 4,
            *(float(previous.mode is mode) for mode in _MODES),
        ],
        np.float32,
    )


def _bounded_log(ratio: float) -> float:
    return max(-5.0, min(5.0, math.log(max(ratio, 1e-9))))
