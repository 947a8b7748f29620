"""Asks another peer to draft for a request of ours, and checks what it answers."""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from dsd_p2p.errors import PeerDisconnected, PeerError, PeerTimeout, RemoteProtocolError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.session.effects import Candidate, Draft
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import ModelKey, PeerId, Sampling, TokenId, short_peer
from dsd_p2p.wire.drafts import MAX_LEVELS, MAX_STEMS, AskDraft, Drafted, EndDrafts, OpenDrafts

_END_TIMEOUT_S = 1.0


class FarDrafts:
    """Hands the answers of drafting peers to the requests that wait for them. vocab_size: of the target."""

    def __init__(self, links: PeerLinks, vocab_size: int) -> None:
        self.links = links
        self.vocab_size = vocab_size
        self._open: dict[tuple[PeerId, bytes], FarSession] = {}

    async def hear(self, event: Arrived, message: Drafted) -> None:
        """Hand an answer to its session; drop an answer that nobody waits for."""
        session = self._open.get((event.sender, message.draft))
        if session is not None:
            session.heard(message)

    def lost(self, event: Lost) -> None:
        """Tell the sessions of a lost peer."""
        for (peer, _), session in self._open.items():
            if peer == event.peer:
                session.heard(PeerDisconnected(f"lost the drafting peer {short_peer(peer)}: {event.reason}"))

    def session(self, peer: PeerId) -> "FarSession":
        """Return a session at `peer`; open it before the first question, and close it in any case."""
        session = FarSession(self, peer)
        self._open[peer, session.draft] = session
        return session

    def forget(self, session: "FarSession") -> None:
        """Hand no more answers to `session`."""
        self._open.pop((session.peer, session.draft), None)


@dataclass(slots=True, kw_only=True)
class _Guess:
    """A guess as it arrived, with the guesses below it."""

    token: TokenId
    logprob: float
    below: list["_Guess"] = field(default_factory=list)

    def candidate(self, source: str) -> Candidate:
        return Candidate(
            token=self.token,
            logprob=self.logprob,
            source=source,
            children=tuple(each.candidate(source) for each in self.below),
            is_complete=bool(self.below),
        )


class FarSession:
    """One request's drafts at another peer. At most one question is under way."""

    def __init__(self, owner: FarDrafts, peer: PeerId) -> None:
        self.peer = peer
        self.draft = secrets.token_bytes(8)
        self._owner = owner
        self._num_known = 0
        self._number = 0
        self._heard, self._answers = trio.open_memory_channel[Drafted | PeerError](2)

    async def open(self, model: ModelKey, max_length: int, sampling: Sampling) -> None:
        """Ask the peer to draft for a text of at most `max_length` tokens.

        Raises:
            PeerError: the peer cannot be reached.
        """
        opening = OpenDrafts(draft=self.draft, model=model, max_length=max_length, sampling=sampling)
        await self._owner.links.send(self.peer, opening)

    def heard(self, answer: Drafted | PeerError) -> None:
        """Take an answer, or the news that the peer is lost; more than one that waits is dropped."""
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._heard.send_nowait(answer)

    async def expand(self, draft: Draft, levels: int, deadline_s: float, source: str) -> list[list[Candidate]]:
        """Return the peer's candidates for each stem, `levels` deep.

        Raises:
            PeerTimeout: no answer came within `deadline_s` seconds.
            PeerDisconnected: the peer is lost or refuses.
            RemoteProtocolError: the answer is not one to this question.
        """
        stems = draft.stems[:MAX_STEMS]
        question = AskDraft(
            draft=self.draft,
            number=self._number,
            start=self._num_known,
            tokens=tuple(draft.tokens[self._num_known :]),
            stems=tuple(tuple(token for _, token in stem.path) for stem in stems),
            width=draft.width,
            levels=min(levels, MAX_LEVELS),
        )
        self._number += 1
        self._num_known = len(draft.tokens)
        with trio.move_on_after(deadline_s):
            await self._owner.links.send(self.peer, question)
            while True:
                try:
                    answer = await self._answers.receive()
                except (trio.ClosedResourceError, trio.EndOfChannel):
                    raise PeerDisconnected("the request drafts elsewhere now") from None
                if isinstance(answer, PeerError):
                    raise answer
                if answer.error:
                    raise PeerDisconnected(f"{short_peer(self.peer)} does not draft for us: {answer.error}")
                if answer.number == question.number:
                    lattice = _lattice(answer, question, self._owner.vocab_size)
                    found = [[each.candidate(source) for each in below] for below in lattice]
                    return found + [[] for _ in draft.stems[len(stems) :]]
        raise PeerTimeout(f"{short_peer(self.peer)} did not draft within {deadline_s:.1f} s")

    async def close(self) -> None:
        """Let the peer free its cache."""
        self._owner.forget(self)
        self._heard.close()
        self._answers.close()
        with trio.CancelScope(shield=True), trio.move_on_after(_END_TIMEOUT_S), suppress(PeerError):
            await self._owner.links.send(self.peer, EndDrafts(draft=self.draft))


def _lattice(answer: Drafted, question: AskDraft, vocab_size: int) -> list[list[_Guess]]:
    """Return the guesses below each stem.

    Raises:
        RemoteProtocolError: they are no answer to the question.
    """
    if not len(answer.parents) == len(answer.tokens) == len(answer.centinats):
        raise RemoteProtocolError("draft answer", "lists of different lengths", "one parent, token and weight a guess")
    stems: list[list[_Guess]] = [[] for _ in question.stems]
    guesses: list[_Guess] = []
    levels: list[int] = []
    for parent, token, centinats in zip(answer.parents, answer.tokens, answer.centinats, strict=True):
        if not -len(stems) <= parent < len(guesses):
            raise RemoteProtocolError("draft answer", f"parent {parent}", "a stem or an earlier guess")
        siblings, level = (stems[-1 - parent], 1) if parent < 0 else (guesses[parent].below, levels[parent] + 1)
        if token >= vocab_size or any(each.token == token for each in siblings):
            raise RemoteProtocolError("draft answer", f"token {token}", "distinct tokens of the vocabulary")
        if len(siblings) >= question.width or level > question.levels:
            raise RemoteProtocolError("draft answer", f"level {level}", f"{question.levels} levels of {question.width}")
        if siblings and -centinats / 100 > siblings[-1].logprob:
            raise RemoteProtocolError("draft answer", "a likelier guess last", "the likeliest first")
        guesses.append(_Guess(token=token, logprob=-centinats / 100))
        levels.append(level)
        siblings.append(guesses[-1])
    return stems
