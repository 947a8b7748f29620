"""What the learned policy is taught with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One scenario, or one recorded decision: inputs `[n, features]` and the label `[arms]` they share, NaN where it is unknown."""

    inputs: NDArray[np.float32]
    label: NDArray[np.float32]
