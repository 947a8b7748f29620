"""Chooses the drafter of a target: `--draft auto`, and any other name as a choice of one.

How it works. `auto` lists what could draft, the most promising first: the drafter that benchmarked fastest for a model
of the catalog, small models beside the target's folder or published siblings of a hub model, the shadow where memory allows,
prompt lookup. `load` takes the first that works; the rest is refused in one sentence each. Until then prompt lookup
answers. After each of the first answers, `learn` measures on its tokens how often each loaded drafter would have had
the next token among its candidates. The drafter with the most predicted tokens a second goes on. If one that is not
loaded yet promises more, it is loaded and measured too.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.measuring import Coverage, coverage_of, step_s_of
from dsd_p2p.drafting.named import LOOKUP, make_drafter, split_name
from dsd_p2p.drafting.shadow import shadow_bytes
from dsd_p2p.drafting.siblings import published_siblings, siblings_beside
from dsd_p2p.errors import CapacityError, DsdError
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.progress import NoProgress, Progress
from dsd_p2p.models.source import ModelSource
from dsd_p2p.placement.coordinator import expected_coverage
from dsd_p2p.placement.view import Speculation, seconds_per_token
from dsd_p2p.types import TokenId

logger = logging.getLogger(__name__)

_NUM_ANSWERS = 3
"""Answers to measure on before the choice stands."""

_MIN_LEAD = 1.1
"""Another drafter must promise this much more: a change costs the request's first tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What one request cost: seconds of a traversal and of its slowest stage."""

    traversal_s: float
    slowest_s: float


@dataclass(slots=True, kw_only=True)
class Rated:
    """A drafter that could be used. drafter: None while it is not loaded. refusal: why it cannot be used, or empty."""

    name: str
    drafter: Drafter | None = None
    refusal: str = ""
    step_s: float = 0.0
    coverage: Coverage

    def tokens_per_s(self, loop: Loop) -> float:
        """Return the predicted speed with this drafter."""
        speculation = Speculation(coverage=self.coverage.rate, draft_s=self.step_s)
        return 1 / seconds_per_token(loop.traversal_s, loop.slowest_s, speculation)


class DrafterChoice:
    """The drafters that may serve a target's requests, and which of them does now. Its methods may block.

    wanted: a drafter's name or "auto". model: the target's name in the catalog. room_bytes: memory for a drafter.
    learns: measure the drafters on the first answers; not worth it for a process that writes only one.
    """

    def __init__(
        self,
        wanted: str,
        target: ModelSource,
        *,
        model: str = "",
        dtype: str = "auto",
        device: str = "cpu",
        room_bytes: int = 1 << 62,
        progress: Progress | None = None,
        learns: bool = True,
    ) -> None:
        self.wanted = wanted
        self._target = target
        self._format = (dtype, device)
        self._progress = progress or NoProgress()
        self._lock = Lock()
        self._num_learned = 0 if learns else _NUM_ANSWERS
        lookup = Rated(name=LOOKUP.name, drafter=LOOKUP, coverage=Coverage(prior=expected_coverage(LOOKUP.name)))
        self._current = lookup
        self.is_loaded = wanted == LOOKUP.name
        names = _candidates(target, model or target.name) if wanted == "auto" else [wanted]
        self.rated = [self._listed(name, room_bytes) for name in names if name != LOOKUP.name] + [lookup]

    @property
    def current(self) -> Drafter:
        """The drafter for the next request."""
        return self._current.drafter or LOOKUP

    @property
    def step_s(self) -> float:
        """Seconds of one step of the current drafter, as measured when it was loaded."""
        return self._current.step_s

    @property
    def wants_texts(self) -> bool:
        """True while answers still help to choose."""
        return self.wanted == "auto" and self.is_loaded and self._num_learned < _NUM_ANSWERS

    @property
    def may_fetch(self) -> bool:
        """True if loading may fetch a model from the hub, which can take long."""
        return self._target.is_on_hub or "/" in self.wanted

    @property
    def refusals(self) -> list[str]:
        """Why each drafter that was considered cannot be used."""
        return [each.refusal for each in self.rated if each.refusal]

    def load(self) -> None:
        """Load the first drafter that works, unless one is loaded.

        Raises:
            ConfigError, ModelError: the drafter that was asked for by name does not work.
        """
        with self._lock:
            if self.is_loaded:
                return
            for each in self.rated:
                if self._is_usable(each):
                    break
            self._current = each
            self.is_loaded = True

    def learn(self, tokens: Sequence[TokenId], num_prompt: int, loop: Loop) -> None:
        """Measure the drafters on an answer, and go on with the one that promises most.

        tokens: prompt and answer. loop: what the request's route took.
        """
        with self._lock:
            self._num_learned += 1
            for each in self.rated:
                if each.drafter is not None:
                    self._measure(each, tokens, num_prompt)
            promising = [each for each in self.rated if not each.refusal]
            best = max(promising, key=lambda each: each.tokens_per_s(loop))
            if best.tokens_per_s(loop) < _MIN_LEAD * self._current.tokens_per_s(loop) or not self._is_usable(best):
                return
            if not best.coverage.num_tokens:
                self._measure(best, tokens, num_prompt)
            if best.tokens_per_s(loop) > self._current.tokens_per_s(loop):
                logger.info("another drafter promises more old=%s new=%s", self._current.name, best.name)
                self._current = best

    def _measure(self, each: Rated, tokens: Sequence[TokenId], num_prompt: int) -> None:
        assert each.drafter is not None
        try:
            each.coverage.add(coverage_of(each.drafter, tokens, num_prompt))
        except CapacityError as exc:
            logger.info("drafter not measured name=%s error=%s", each.name, exc)

    def _is_usable(self, each: Rated) -> bool:
        """Load a drafter if need be; return whether it can draft."""
        if each.drafter is not None or each.refusal:
            return not each.refusal
        dtype, device = self._format
        started_s = time.perf_counter()
        try:
            each.drafter = make_drafter(each.name, self._target, self._progress, dtype=dtype, device=device)
        except DsdError as exc:
            if self.wanted != "auto":
                raise
            each.refusal = str(exc)
            logger.info("drafter refused name=%s error=%s", each.name, exc)
            return False
        each.step_s = step_s_of(each.drafter)
        logger.info(
            "drafter loaded name=%s seconds=%.1f step_ms=%.1f",
            each.name,
            time.perf_counter() - started_s,
            1e3 * each.step_s,
        )
        return True

    def _listed(self, name: str, room_bytes: int) -> Rated:
        rated = Rated(name=name, coverage=Coverage(prior=expected_coverage(name)))
        if self.wanted == "auto" and split_name(name)[0] == "shadow":
            needed = shadow_bytes(self._target)
            if needed > room_bytes:
                rated.refusal = (
                    f"drafter {name}: making it takes {needed / 1e9:.1f} GB of memory, {max(0, room_bytes) / 1e9:.1f} GB "
                    "are free for it"
                )
        return rated


def _candidates(target: ModelSource, model: str) -> list[str]:
    """Return the names of what could draft, the most promising first."""
    if model in CATALOG:
        return [CATALOG[model].drafter]
    # A model from the hub may fetch a sibling from there; a folder stays what it is, without the network.
    siblings = published_siblings(target) if target.is_on_hub else siblings_beside(target)
    return [f"{name}+{LOOKUP.name}" for name in (*siblings, "shadow") if name != target.name]
