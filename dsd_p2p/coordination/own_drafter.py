"""Loads this process's drafter in the background and lets it learn from answers; requests never wait for either."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from dsd_p2p.drafting.base import Drafter, DraftSession
from dsd_p2p.drafting.choice import DrafterChoice, Loop
from dsd_p2p.errors import CapacityError, DsdError
from dsd_p2p.types import TokenId
from dsd_p2p.verification.grammar import Grammars
from dsd_p2p.wire.drafts import OpenDrafts

logger = logging.getLogger(__name__)


class OwnDrafter:
    """The drafter of the requests that this process coordinates.

    drafter: a drafter that is loaded, or the choice of one. changed: called when another drafter is in use.
    grammars: compiles constraints, so that drafts keep to them, if set.
    failure: why the drafter that was asked for could not be loaded, or empty; prompt lookup drafts instead.
    """

    def __init__(self, drafter: Drafter | DrafterChoice, nursery: trio.Nursery) -> None:
        self._choice = drafter if isinstance(drafter, DrafterChoice) else None
        self.current: Drafter = drafter.current if isinstance(drafter, DrafterChoice) else drafter
        self._nursery = nursery
        self._is_loading = False
        self.failure = ""
        self.grammars: Grammars | None = None
        self.changed: Callable[[], None] = lambda: None

    @property
    def step_s(self) -> float:
        """Seconds of one step of the drafter, measured when it was loaded; 0 if it takes none, or is not known."""
        return self._choice.step_s if self._choice else 0.0

    @property
    def refusals(self) -> list[str]:
        """Why each drafter that was considered cannot be used."""
        return [*(self._choice.refusals if self._choice else []), *([self.failure] if self.failure else [])]

    def choose(self, choice: DrafterChoice) -> None:
        """Replace the choice; prompt lookup drafts until the new drafter is loaded."""
        self._choice, self._is_loading, self.failure = choice, False, ""
        self._adopt(choice)
        self.want()

    def want(self) -> None:
        """Load the drafter unless it is loaded or loading."""
        if self._choice is not None and not self._choice.is_loaded and not self._is_loading:
            self._is_loading = True
            self._nursery.start_soon(self._load, self._choice)

    def open_for_peer(self, message: OpenDrafts) -> DraftSession:
        """Open a session for another peer's request.

        Raises:
            CapacityError: no drafting model is loaded here, or there is no room for the request.
        """
        if self.current.is_instant:
            raise CapacityError("no drafting model is loaded here")
        return self.current.open(message.max_length, message.sampling)

    def learn(self, tokens: Sequence[TokenId], num_prompt: int, loop: Loop) -> None:
        """Measure the drafters on an answer, if the choice is still open. loop: what the request's route took."""
        if self._choice is not None and self._choice.wants_texts:
            self._nursery.start_soon(self._learn, self._choice, tokens, num_prompt, loop)

    async def _load(self, choice: DrafterChoice) -> None:
        await self._run(choice.load, choice)
        self._adopt(choice)

    async def _learn(self, choice: DrafterChoice, tokens: Sequence[TokenId], num_prompt: int, loop: Loop) -> None:
        await self._run(partial(choice.learn, tokens, num_prompt, loop), choice)
        self._adopt(choice)

    async def _run(self, function: Callable[[], None], choice: DrafterChoice) -> None:
        """Run `function` in a thread; its failure costs only better guesses.

        A process that ends waits for it, because torch aborts where its thread is killed. It does not wait for a
        download.
        """
        is_abandoned = choice.may_fetch
        try:
            await trio.to_thread.run_sync(function, abandon_on_cancel=is_abandoned)  # type: ignore[call-arg]  # older stubs
        except DsdError as exc:
            self.failure = str(exc)
            logger.warning("drafter not loaded, going on without it error=%s", exc)
        except Exception as exc:  # task boundary: no drafter must end the requests that are running
            self.failure = f"the drafter failed: {type(exc).__name__}: {exc}"
            logger.exception("drafter failed, going on without it")

    def _adopt(self, choice: DrafterChoice) -> None:
        if choice is self._choice and choice.current is not self.current:
            self.current = choice.current
            self.changed()
