"""Defines the training data of the learned policy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One scenario, or one recorded decision.

    inputs: `[n, features]`. label: `[arms]`, shared by all inputs, NaN where it is unknown.
    """

    inputs: NDArray[np.float32]
    label: NDArray[np.float32]
