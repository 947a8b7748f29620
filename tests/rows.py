"""A target's view after one node, for tests of verifiers."""

import numpy as np


class Row:
    def __init__(self, logits):
        self._logits = np.asarray(logits, np.float32)

    def argmax(self):
        return int(self._logits.argmax())

    def logits(self):
        return self._logits
