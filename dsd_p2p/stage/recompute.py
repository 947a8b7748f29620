"""Answers spot checks of other stages: runs part of our span over a given text (`dsd_p2p.coordination.audit`).

A check's rows go through the batcher in pieces like a prompt, so nobody waits for more than one piece. Logits are judged
piece by piece and are not kept. In half precision some rows are computed twice, to tell how much honest rows differ.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import trio

from dsd_p2p.cache.passes import SpanOutput, SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import Forward, SlotTable
from dsd_p2p.errors import CapacityError, DsdError, PeerError, RemoteProtocolError
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.stage.batcher import Answer, Batcher, Cost
from dsd_p2p.stage.compiling import compile_constraint
from dsd_p2p.stage.span_model import SpanCache, SpanModel
from dsd_p2p.types import ComputeFormat, PeerId, Span, TokenId, check_same_model
from dsd_p2p.verification.base import TargetView
from dsd_p2p.verification.choice import choose_verifier
from dsd_p2p.wire.attest import ALWAYS_PROBED, NO_PROBES, probes_of, row_errors
from dsd_p2p.wire.hidden import to_float32
from dsd_p2p.wire.messages import MAX_GAP, Recompute, Recomputed

logger = logging.getLogger(__name__)

_CHECKS = Scopes(what="checks", node=4, root=2, peer=1)
"""Checks that a stage runs at the same time. Each holds the cache and the rows of its text."""

NUM_AGAIN, _PIECE_AGAIN = ALWAYS_PROBED, 4
"""Rows that are computed a second time, and how many at once: CPUs and GPUs round otherwise for few rows than for many."""

_SEND_TIMEOUT_S = 10.0


class Recomputer:
    """The service that answers spot checks, one at a time for each peer.

    make_room: evicts one parked text; returns False if there is none.
    """

    def __init__(self, links: PeerLinks, batcher: Batcher, make_room: Callable[[], bool]) -> None:
        self._links = links
        self._batcher = batcher
        self._make_room = make_room
        self._busy_for: set[PeerId] = set()

    def begin(self, peer: PeerId) -> None:
        """Take the place of a check for `peer`, until `answer` ends.

        Raises:
            CapacityError: too many checks run.
        """
        _CHECKS.check(((each, 1) for each in self._busy_for), peer, 1, self._links.root_of)
        self._busy_for.add(peer)

    async def answer(
        self, part_of: Callable[[Span], SpanModel], sender: PeerId, asked: Recompute, payload: bytes
    ) -> None:
        """Compute the answer and send it, or send the error."""
        error = ""
        try:
            await self._send(sender, *await self._run(part_of, sender, asked, payload))
        except DsdError as exc:
            error = str(exc)[:512]
        except Exception as exc:  # task boundary: a failed check must not end the peer
            logger.exception("check failed peer=%s", sender)
            error = type(exc).__name__
        finally:
            self._busy_for.discard(sender)
        if error:
            await self._send(sender, Recomputed(request=asked.request, error=error), b"")

    async def _run(
        self, part_of: Callable[[Span], SpanModel], sender: PeerId, asked: Recompute, payload: bytes
    ) -> tuple[Recomputed, bytes]:
        check_same_model(self._links.me.model, asked.model)
        part = part_of(asked.span)
        _check_asked(asked, part, payload)
        if part.is_tail:
            await compile_constraint(part, asked.text)
        with ExitStack() as stack:
            caches = [await self._cache(part, len(asked.tokens))]
            stack.callback(caches[0].free)
            if asked.model.compute is not ComputeFormat.FLOAT32:
                caches.append(await self._cache(part, NUM_AGAIN))
                stack.callback(caches[1].free)
            answer = await self._batcher.run(RecomputePass(part, caches, sender, asked, payload))
        assert answer is not None, "a check is never stale"
        message, rows = answer
        assert isinstance(message, Recomputed)
        return message, rows

    async def _cache(self, part: SpanModel, num_slots: int) -> SpanCache:
        """Return an empty cache; evict parked texts if it needs their room.

        Raises:
            CapacityError: open sessions fill the memory budget.
        """
        with suppress(CapacityError):
            return part.new_cache(num_slots)
        async with self._batcher.model_in_use:
            while True:
                try:
                    return part.new_cache(num_slots)
                except CapacityError:
                    if not self._make_room():
                        raise

    async def _send(self, to: PeerId, message: Recomputed, payload: bytes) -> None:
        with suppress(PeerError), trio.move_on_after(_SEND_TIMEOUT_S):
            await self._links.send(to, message, payload)


def _check_asked(asked: Recompute, part: SpanModel, payload: bytes) -> None:
    """Check that a question can be answered with `part`.

    Raises:
        RemoteProtocolError: its numbers or its payload are wrong.
    """
    num_nodes = len(asked.tokens)
    if asked.num_prompt > num_nodes:
        raise RemoteProtocolError("num_prompt", asked.num_prompt, f"at most the {num_nodes} tokens of the text")
    num_bytes = 0 if part.is_head else num_nodes * part.row_bytes
    if len(payload) != num_bytes:
        raise RemoteProtocolError("payload length", len(payload), f"{num_bytes} bytes")


class RecomputePass:
    """The `Work` of one check. caches: one, and a second one if the rounding of rows is to be measured."""

    def __init__(
        self, part: SpanModel, caches: Sequence[SpanCache], owner: PeerId, asked: Recompute, payload: bytes
    ) -> None:
        self.model = part
        self.num_layers = asked.span.num_layers
        self.owner = owner
        self.arrived_s = 0.0
        self.is_begun = False
        self.is_stale = False
        self._asked = asked
        self._caches = caches
        self._inputs: list[TokenId] | bytes = list(asked.tokens) if part.is_head else payload
        self._judge: _Judge | None = None
        self._runs: list[_Run] = []

    @property
    def num_left(self) -> int:
        """The number of rows still to compute; before `begin`, an upper bound."""
        if not self.is_begun:
            return len(self._asked.tokens) + NUM_AGAIN * (len(self._caches) - 1)
        return sum(run.num_rows - run.num_done for run in self._runs)

    @property
    def _run(self) -> "_Run":
        return next(run for run in self._runs if run.num_done < run.num_rows)

    def begin(self) -> None:
        """Lay out the text. For thousands of tokens that takes too long for the event loop.

        Raises:
            ConfigError: the text's settings are not served.
        """
        num_all = len(self._asked.tokens)
        sizes = ((num_all, num_all), (min(num_all, NUM_AGAIN), _PIECE_AGAIN))
        self._runs = [_Run(cache, *size) for cache, size in zip(self._caches, sizes, strict=False)]
        self._judge = _Judge(self._asked, self.model) if self.model.is_tail else None
        self.is_begun = True

    def piece(self, max_rows: int) -> SpanPass:
        """Return the pass over the next rows."""
        run = self._run
        start, end = run.num_done, min(run.num_done + min(max_rows, run.max_piece), run.num_rows)
        size = self.model.row_bytes if isinstance(self._inputs, bytes) else 1
        return SpanPass(
            cache=run.cache,
            forward=run.forward.part(start, end),
            inputs=self._inputs[start * size : end * size],
            wanted=range(end - start) if self.model.is_tail else (),
        )

    def take(self, done: SpanPass, output: SpanOutput) -> None:
        """Keep the rows of a piece, and judge the picks after them. Raises the pass's error."""
        run = self._run
        if self._judge is None:
            run.rows.append(hidden_of(output))
        elif run is self._runs[0]:
            run.rows += [self._judge.row(view) for view in views_of(output)]
        else:
            run.rows += [probes_of(view.logits()) for view in views_of(output)]
        run.num_done += done.num_rows

    def finish(self, cost: Cost) -> Answer:
        """Return the answer."""
        return self.result()

    def result(self) -> tuple[Recomputed, bytes]:
        """Return the answer and its rows."""
        gaps = tuple(self._judge.gaps) if self._judge else ()
        rows = b"".join(self._runs[0].rows)
        return Recomputed(request=self._asked.request, gaps=gaps, noise=self._noise(rows)), rows

    def _noise(self, rows: bytes) -> int:
        """Return the mean difference between the two runs in millionths of a row, where both have one."""
        if len(self._runs) < 2:
            return 0
        num_rows = self._runs[1].num_rows
        compute = self._asked.model.compute if self._judge is None else ComputeFormat.FLOAT32
        again = to_float32(b"".join(self._runs[1].rows), compute).reshape(num_rows, -1)
        first = rows[: len(rows) // len(self._asked.tokens) * num_rows]
        errors = row_errors(again, to_float32(first, compute).reshape(num_rows, -1))
        return round(1e6 * min(1.0, float(errors.mean())))


class _Run:
    """One way through the text. max_piece: the most rows in a pass."""

    def __init__(self, cache: SpanCache, num_rows: int, max_piece: int) -> None:
        self.cache = cache
        self.num_rows = num_rows
        self.max_piece = max_piece
        self.forward: Forward = SlotTable().chain(num_rows)
        self.num_done = 0
        self.rows: list[bytes] = []


class _Judge:
    """Judges the tokens of a text one after the other. gaps: by how much each falls short of the target's pick."""

    def __init__(self, asked: Recompute, part: SpanModel) -> None:
        self._claimed = (*asked.tokens[1:], asked.following)
        self._num_prompt = asked.num_prompt
        self._verifier = choose_verifier(asked.text, part.grammars).open(asked.num_prompt)
        self._is_lost = False
        self.gaps: list[int] = []

    def row(self, view: TargetView) -> bytes:
        """Judge the token after the next position; return the tail's row there.

        Within the prompt nothing is picked. After a token that cannot be picked, nothing can be judged.
        """
        position = len(self.gaps) + 1
        claimed = self._claimed[position - 1]
        self.gaps.append(0)
        if position < self._num_prompt:
            return probes_of(view.logits()) if position <= ALWAYS_PROBED else NO_PROBES
        if claimed >= 0 and not self._is_lost:
            self.gaps[-1] = self._gap(view, claimed)
        return probes_of(view.logits())

    def _gap(self, view: TargetView, claimed: TokenId) -> int:
        pick = self._verifier.judge(view, None).token
        gap = 0.0 if pick == claimed else self._verifier.gap(view, pick, claimed)
        try:
            self._verifier.accept(claimed)
        except RemoteProtocolError:
            gap, self._is_lost = math.inf, True
        return MAX_GAP if not math.isfinite(gap) else max(0, min(MAX_GAP, round(1000 * gap)))
