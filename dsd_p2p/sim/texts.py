"""Supplies the answers of a run's requests, recorded or parametric."""

import random

from dsd_p2p.errors import ConfigError
from dsd_p2p.sim.agreement import Agreement
from dsd_p2p.sim.answer import Answer, ParametricAnswer, RecordedAnswer
from dsd_p2p.sim.scenario import Acceptance
from dsd_p2p.sim.workload import Arrival


class Texts:
    """The answers of one run. trace: recorded agreement to use instead of parameters. rng: for parametric answers.

    Raises:
        ConfigError: the agreement has no text of the requested category.
    """

    def __init__(self, acceptance: Acceptance, trace: Agreement | None, rng: random.Random) -> None:
        self._acceptance = acceptance
        self._trace = trace
        self._rng = rng
        self._suitable = [] if trace is None else _suitable(acceptance, trace)

    def answer(self, number: int, arrival: Arrival) -> Answer:
        """Return the answer to request `number`."""
        if self._trace is None:
            return ParametricAnswer(self._acceptance.agreement(), self._rng.getrandbits(48))
        text = self._trace.texts[self._suitable[number % len(self._suitable)]]
        return RecordedAnswer(text, arrival.num_prompt_tokens, self._trace.vocab_size)


def _suitable(acceptance: Acceptance, trace: Agreement) -> list[int]:
    texts = [index for index, text in enumerate(trace.texts) if acceptance.category in ("", text.category)]
    if not texts:
        known = ", ".join(sorted({text.category for text in trace.texts}))
        raise ConfigError(
            f"acceptance.category is {acceptance.category!r}, expected one that the agreement has: {known}"
        )
    return texts
