"""Limits how many answers are written at once and decides whose turn is next."""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.errors import CapacityError
from dsd_p2p.session.effects import Emit
from dsd_p2p.types import TokenId
from node.gateway.backend import Backend, Outcome

_FIRST_RETRY_S, _MAX_RETRY_S = 0.25, 4.0


@dataclass(slots=True, eq=False)
class _Waiting:
    owner: str
    may_enter: trio.Event = field(default_factory=trio.Event)


class Admission:
    """A gate that admits a bounded number of answers.

    A free place goes to the waiting owner with the fewest running answers.

    max_running, max_waiting: numbers of answers. timeout_s: the longest wait.
    """

    def __init__(self, *, max_running: int, max_waiting: int, timeout_s: float) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._running: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []

    @property
    def num_running(self) -> int:
        """The number of answers being written."""
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        """The number of answers waiting for a place."""
        return len(self._waiting)

    @asynccontextmanager
    async def enter(self, owner: str) -> AsyncIterator[None]:
        """Wait for a place and hold it until the end of the block.

        Raises:
            CapacityError: too many answers wait already, or no place became free in time.
        """
        await self._wait(owner)
        try:
            yield
        finally:
            self._leave(owner)

    async def _wait(self, owner: str) -> None:
        if self.num_running < self._max_running and not self._waiting:
            self._running[owner] += 1
            return
        if len(self._waiting) >= self._max_waiting:
            raise CapacityError(f"{len(self._waiting)} requests are waiting already: try again later")
        place = _Waiting(owner)
        self._waiting.append(place)
        try:
            with trio.fail_after(self._timeout_s):
                await place.may_enter.wait()
        except trio.TooSlowError:
            self._give_up(place)
            raise CapacityError(f"no place became free within {self._timeout_s:g} s: try again later") from None
        except BaseException:
            self._give_up(place)
            raise

    def _give_up(self, place: _Waiting) -> None:
        if place.may_enter.is_set():
            self._leave(place.owner)
        else:
            self._waiting.remove(place)

    def _leave(self, owner: str) -> None:
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        if self._waiting and self.num_running < self._max_running:
            chosen = min(self._waiting, key=lambda place: self._running[place.owner])
            self._waiting.remove(chosen)
            self._running[chosen.owner] += 1
            chosen.may_enter.set()


class PatientBackend:
    """A backend that waits and retries while the stages have no room for another session's cache.

    timeout_s: the longest wait.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    async def write(
        self, prompt: Sequence[TokenId], options: GenerateOptions, outcome: Outcome
    ) -> AsyncGenerator[Emit, None]:
        """Yield an answer piece by piece. Raises the same errors as `Backend.write`."""
        deadline_s, delay_s = trio.current_time() + self._timeout_s, _FIRST_RETRY_S
        while True:
            is_begun = False
            try:
                async with aclosing(self._backend.write(prompt, options, outcome)) as pieces:
                    async for piece in pieces:
                        is_begun = True
                        yield piece
            except CapacityError:
                if is_begun or trio.current_time() + delay_s > deadline_s:
                    raise
            else:
                return
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_RETRY_S)
