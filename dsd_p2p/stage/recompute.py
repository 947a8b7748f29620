"""Answers spot checks of other stages: runs part of our span over a given text (`dsd_p2p.coordination.audit`)."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from dsd_p2p.cache.passes import SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.errors import CapacityError, DsdError, PeerDisconnected, PeerError, RemoteProtocolError
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.compiling import compile_constraint
from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import PeerId, PeerInfo, Sampling, TokenId, check_same_model
from dsd_p2p.verification.base import TargetView, VerifierSession
from dsd_p2p.verification.choice import choose_verifier
from dsd_p2p.verification.grammar import Grammars
from dsd_p2p.wire.messages import MAX_GAP, Recompute, Recomputed

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 10.0


class Recomputer:
    """The service that answers spot checks, one at a time for each peer.

    model_in_use: a lock, held while the model runs. make_room: evicts one parked text; returns False if there is none.
    """

    def __init__(self, links: PeerLinks, model_in_use: trio.Lock, make_room: Callable[[], bool]) -> None:
        self._links = links
        self._model_in_use = model_in_use
        self._make_room = make_room
        self._busy_for: set[PeerId] = set()

    async def answer(self, model: SpanModel | None, sender: PeerId, asked: Recompute, payload: bytes) -> None:
        """Compute the answer and send it, or send the error."""
        if sender in self._busy_for:
            await self._send(
                sender,
                Recomputed(request=asked.request, error="a check for this peer is still running: try again later"),
                b"",
            )
            return
        self._busy_for.add(sender)
        try:
            picks, gaps, rows = await self._run(model, asked, payload)
            await self._send(sender, Recomputed(request=asked.request, picks=picks, gaps=gaps), rows)
        except DsdError as exc:
            await self._send(sender, Recomputed(request=asked.request, error=str(exc)[:512]), b"")
        except Exception as exc:  # task boundary: a failed check must not end the peer
            logger.exception("check failed peer=%s", sender)
            await self._send(sender, Recomputed(request=asked.request, error=type(exc).__name__), b"")
        finally:
            self._busy_for.discard(sender)

    async def _run(
        self, model: SpanModel | None, asked: Recompute, payload: bytes
    ) -> tuple[tuple[TokenId, ...], tuple[int, ...], bytes]:
        if model is not None and model.is_tail:
            await compile_constraint(model, asked.text)
        async with self._model_in_use:
            while True:
                try:
                    return await trio.to_thread.run_sync(_compute, model, self._links.me, asked, payload)
                except CapacityError:
                    if not self._make_room():
                        raise

    async def _send(self, to: PeerId, message: Recomputed, payload: bytes) -> None:
        with suppress(PeerError), trio.move_on_after(_SEND_TIMEOUT_S):
            await self._links.send(to, message, payload)


def _compute(
    model: SpanModel | None, me: PeerInfo, asked: Recompute, payload: bytes
) -> tuple[tuple[TokenId, ...], tuple[int, ...], bytes]:
    """Return the tail's picks and gaps for each position, else the hidden states. Runs in a worker thread."""
    check_same_model(me.model, asked.model)
    if model is None:
        raise PeerDisconnected("this peer holds no layers now: ask another")
    part, num_nodes = model.narrow(asked.span), len(asked.tokens)
    if asked.num_prompt > num_nodes:
        raise RemoteProtocolError("num_prompt", asked.num_prompt, f"at most the {num_nodes} tokens of the text")
    if not part.is_head and len(payload) != num_nodes * part.row_bytes:
        raise RemoteProtocolError("payload length", len(payload), f"{num_nodes * part.row_bytes} bytes")
    inputs: list[TokenId] | bytes = list(asked.tokens) if part.is_head else payload
    cache = part.new_cache(num_nodes)
    try:
        forward = SlotTable().chain(num_nodes)
        if not part.is_tail:
            return (), (), hidden_of(part.run([SpanPass(cache=cache, forward=forward, inputs=inputs)])[0])
        asked_pass = SpanPass(cache=cache, forward=forward, inputs=inputs, wanted=range(num_nodes))
        picks, gaps = _judge(asked, views_of(part.run([asked_pass])[0]), part.grammars)
        return picks, gaps, b""
    finally:
        cache.free()


def _judge(
    asked: Recompute, views: Sequence[TargetView], grammars: Grammars | None
) -> tuple[tuple[TokenId, ...], tuple[int, ...]]:
    """Return the token that the target picks after each position, and how far the claimed one is from it.

    Within the prompt they are the prompt's own. After a token that the constraint does not allow, nothing can be judged.
    """
    verifier = choose_verifier(asked.text, grammars).open(asked.num_prompt)
    picks: list[TokenId] = []
    gaps: list[int] = []
    is_lost = False
    for position, view in enumerate(views, start=1):
        claimed = asked.tokens[position] if position < len(asked.tokens) else None
        if claimed is not None and (position < asked.num_prompt or is_lost):
            picks.append(claimed)
            gaps.append(0)
            continue
        pick = verifier.judge(view, None).token
        picks.append(pick)
        gaps.append(0 if claimed is None else _gap(verifier, view, pick, claimed, asked.text.sampling))
        if claimed is not None:
            try:
                verifier.accept(claimed)
            except RemoteProtocolError:
                gaps[-1], is_lost = MAX_GAP, True
    return tuple(picks), tuple(gaps)


def _gap(verifier: VerifierSession, view: TargetView, pick: TokenId, claimed: TokenId, sampling: Sampling) -> int:
    """Return how far the claimed token's logit is below the pick's, in thousandths; with sampling, 0 or `MAX_GAP`."""
    if pick == claimed:
        return 0
    gap = verifier.gap(view, pick, claimed) if sampling.is_greedy else math.inf
    return MAX_GAP if not math.isfinite(gap) else max(0, min(MAX_GAP, round(1000 * gap)))
