"""Says how far an honest stage's rows and picks may be from a replica's.

Two machines, or two sizes of windows, round differently. In float32 that changes a millionth of a row, and weights of 8
bits change a hundredth: fixed limits tell them apart. In half precision both are of one order and depend on the model and
on the number of layers. So the replica computes some rows twice, in different pieces, and the mean difference between
them is the measure: honest stages stay within 1.2 of it, weights of 8 bits are 1.7 times and more above it
(docs/benchmarks.md, "What audits catch"). The fixed limits then only bound what a replica may say of its own noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_p2p.types import INT8, STORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The limits of honest noise. An error is the Euclidean norm of a difference over that of the row.

    least, most: bounds of the limit of the mean error over all rows; in half precision, `least` is one rounding.
    row: the error of a single row.
    floor: what honest machines may differ by even where one machine sees no noise.
    gap: by how much a pick may fall short of the target's own, in logits. mean_gap: the same, over all picks.
    """

    least: float
    most: float
    row: float
    gap: float
    mean_gap: float
    floor: float

    def mean(self, noise: float, num_rows: int) -> float:
        """Return the limit of the mean error over `num_rows` rows. noise: what the replica measured of its own."""
        if not noise and num_rows < _MEASURABLE_ROWS:
            return self.most
        return min(max(_NOISE_FACTOR * noise, self.least), self.most)


_NOISE_FACTOR = 1.5

_MEASURABLE_ROWS = 16
"""A shorter text runs in pieces of one size, so computing it twice measures nothing."""

_LEAST_PICKS = 32
"""A single near-tie in half precision is an eighth of a logit: over fewer picks their mean says nothing."""

_BY_WEIGHTS = {
    "float32": Tolerance(least=1e-4, most=1e-4, row=1e-3, gap=0.01, mean_gap=0.0005, floor=1e-5),
    "float16": Tolerance(least=2**-11, most=0.005, row=0.02, gap=0.2, mean_gap=0.004, floor=2**-11),
    "bfloat16": Tolerance(least=2**-8, most=0.04, row=0.15, gap=1.5, mean_gap=0.03, floor=2**-8),
    # The products of a CPU without VNNI round to half as many steps: ten layers then differ by up to 0.08.
    INT8: Tolerance(least=0.1, most=0.1, row=0.15, gap=2.0, mean_gap=0.1, floor=0.1),
    STORED: Tolerance(least=0.1, most=0.1, row=0.15, gap=2.0, mean_gap=0.1, floor=0.1),
}


def tolerance_of(weights: str) -> Tolerance:
    """Return the limits for weights of a format (`dsd_p2p.types.ModelKey.weights`)."""
    return _BY_WEIGHTS[weights]


def first_wrong_row(errors: NDArray[np.float64], mean: float, row: float) -> int | None:
    """Return the first row that honest noise does not explain, or None. mean, row: the limits."""
    wrong = np.flatnonzero(errors > row)
    if len(wrong):
        return int(wrong[0])
    return 0 if len(errors) and errors.mean() > mean else None


def first_wrong_pick(gaps_milli: Sequence[int], tolerance: Tolerance) -> int | None:
    """Return the first pick that honest noise does not explain, or None. gaps_milli: of all picks, in thousandths."""
    gaps = np.array(gaps_milli, np.float64) / 1e3
    wrong = np.flatnonzero(gaps > tolerance.gap)
    if len(wrong):
        return int(wrong[0])
    is_off = len(gaps) > 0 and gaps.sum() / max(len(gaps), _LEAST_PICKS) > tolerance.mean_gap
    return int(np.argmax(gaps)) if is_off else None
