"""Drafts for coordinators nearby: stems in, a lattice of guesses out. A service of `dsd_p2p.peers.services`.

How it works. Each request that drafts here has one drafting session with a cache of its own. The wire carries tokens
only; a `_Trie` gives every path of tokens a key, so that nodes grown here and asked for later are not computed twice.
A question with several levels is grown here, so that one trip brings more than one level. Bounds: sessions in all and
of one peer, one question under way each, guesses of one answer, idle time.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from dsd_p2p.drafting.base import DraftSession
from dsd_p2p.errors import DsdError, PeerError, RemoteProtocolError
from dsd_p2p.peers.links import Arrived, PeerLinks
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.peers.services import Handler
from dsd_p2p.session.effects import Candidate, Draft, Stem
from dsd_p2p.transport.base import Lost
from dsd_p2p.types import ModelKey, PeerId, TokenId, check_same_model
from dsd_p2p.wire.drafts import MAX_GUESSES, AskDraft, Drafted, EndDrafts, OpenDrafts
from dsd_p2p.wire.messages import Message

logger = logging.getLogger(__name__)

_DRAFTS = Scopes(what="drafts", node=16, root=8, peer=4)
_IDLE_S = 120.0
"""A coordinator that asks nothing for so long has gone on elsewhere."""

_SEND_TIMEOUT_S = 5.0
_MAX_PATHS = 8192
_LEAST_LOGPROB = -1000.0


class _Trie:
    """The key of each path of tokens below the text, and of each token of the text."""

    def __init__(self) -> None:
        self.tokens: list[TokenId] = []
        self.keys: list[int] = []
        self._below: dict[tuple[int, TokenId], int] = {}
        self._next = 0

    def extend(self, tokens: tuple[TokenId, ...]) -> None:
        """Add committed tokens; those that were guessed before keep their keys."""
        for token in tokens:
            self.keys.append(self.key_below(self.keys[-1] if self.keys else -1, token))
            self.tokens.append(token)

    def key_below(self, parent: int, token: TokenId) -> int:
        """Return the key of `token` after the node `parent`."""
        if len(self._below) >= _MAX_PATHS:
            self._below.clear()
        known = self._below.setdefault((parent, token), self._next)
        self._next += known == self._next
        return known

    def stem(self, path: tuple[TokenId, ...]) -> Stem:
        """Return the stem at the end of `path`, which begins after the text."""
        key, keyed = self.keys[-1], []
        for token in path:
            key = self.key_below(key, token)
            keyed.append((key, token))
        return Stem(key=key, path=tuple(keyed))


@dataclass(slots=True, kw_only=True)
class _Session:
    guesses: DraftSession
    trie: _Trie = field(default_factory=_Trie)
    is_busy: bool = False
    is_over: bool = False
    used_at_s: float


@dataclass(slots=True, kw_only=True)
class _Grown:
    """A guess in the answer: its place there, its stem, and the log probability of its path below the asked stem."""

    index: int
    stem: Stem
    logprob: float


class DraftService:
    """Answers the questions of coordinators with the process's own drafter.

    opened: opens a session of that drafter for a text of at most so many tokens, sampled so; may raise CapacityError.
    model: the target that it drafts for.
    """

    def __init__(self, links: PeerLinks, opened: Callable[[OpenDrafts], DraftSession], model: ModelKey) -> None:
        self._links = links
        self._opened = opened
        self._model = model
        self._nursery: trio.Nursery | None = None
        self._sessions: dict[tuple[PeerId, bytes], _Session] = {}

    def start(self, nursery: trio.Nursery) -> None:
        """Answer in `nursery`."""
        self._nursery = nursery
        nursery.start_soon(self._sweep_forever)

    @property
    def num_sessions(self) -> int:
        """How many requests of other peers draft here."""
        return len(self._sessions)

    @property
    def handlers(self) -> Mapping[type[Message], Handler]:
        """The handler of each message type."""
        return {OpenDrafts: self._open, AskDraft: self._ask, EndDrafts: self._end}

    def lost(self, event: Lost) -> None:
        """Free what a lost coordinator used."""
        for name in [name for name in self._sessions if name[0] == event.peer]:
            self._close(name)

    async def _open(self, event: Arrived, message: OpenDrafts) -> None:
        assert self._nursery is not None, "start first"
        name = (event.sender, message.draft)
        if name in self._sessions:
            raise RemoteProtocolError("draft", message.draft.hex(), "a name that is not in use")
        try:
            check_same_model(self._model, message.model)
            _DRAFTS.check(((peer, 1) for peer, _ in self._sessions), event.sender, 1, self._links.root_of)
            guesses = self._opened(message)
        except DsdError as exc:
            self._nursery.start_soon(self._reply, event.sender, _refusal(message.draft, 0, str(exc)))
            return
        self._sessions[name] = _Session(guesses=guesses, used_at_s=trio.current_time())

    async def _ask(self, event: Arrived, message: AskDraft) -> None:
        assert self._nursery is not None, "start first"
        session = self._sessions.get((event.sender, message.draft))
        if session is None:
            # It was refused or swept while the question travelled.
            refusal = _refusal(message.draft, message.number, "no such draft is open here")
            self._nursery.start_soon(self._reply, event.sender, refusal)
            return
        if session.is_busy:
            raise RemoteProtocolError("draft question", message.number, "one after the answer to the last")
        if message.start != len(session.trie.tokens) or not message.start + len(message.tokens):
            raise RemoteProtocolError("draft start", message.start, f"{len(session.trie.tokens)}, where the text ends")
        session.is_busy = True
        session.used_at_s = trio.current_time()
        self._nursery.start_soon(self._answer, event.sender, session, message)

    async def _end(self, event: Arrived, message: EndDrafts) -> None:
        self._close((event.sender, message.draft))

    async def _answer(self, peer: PeerId, session: _Session, message: AskDraft) -> None:
        try:
            reply = await trio.to_thread.run_sync(_grow, session, message)
        except Exception as exc:  # task boundary: a drafter that fails must not end the process
            logger.exception("drafting for a peer failed peer=%s", peer)
            reply = _refusal(message.draft, message.number, f"the drafter failed: {type(exc).__name__}")
        session.is_busy = False
        if session.is_over:
            session.guesses.close()
            return
        if reply.error:
            self._close((peer, message.draft))
        await self._reply(peer, reply)

    async def _reply(self, peer: PeerId, reply: Drafted) -> None:
        with suppress(PeerError), trio.move_on_after(_SEND_TIMEOUT_S):
            await self._links.send(peer, reply)

    def _close(self, name: tuple[PeerId, bytes]) -> None:
        """End a session; while a thread still drafts in it, its end is left to that thread's task."""
        session = self._sessions.pop(name, None)
        if session is not None:
            session.is_over = True
            if not session.is_busy:
                session.guesses.close()

    async def _sweep_forever(self) -> None:
        while True:
            await trio.sleep(_IDLE_S / 4)
            oldest_s = trio.current_time() - _IDLE_S
            for name in [name for name, each in self._sessions.items() if each.used_at_s < oldest_s]:
                self._close(name)


def _grow(session: _Session, message: AskDraft) -> Drafted:
    """Return the guesses of all levels asked for. Runs in a worker thread."""
    trie = session.trie
    trie.extend(message.tokens)
    parents: list[int] = []
    tokens: list[TokenId] = []
    centinats: list[int] = []
    level = [_Grown(index=-1 - number, stem=trie.stem(path), logprob=0.0) for number, path in enumerate(message.stems)]
    for _ in range(message.levels):
        draft = Draft(tokens=trie.tokens, keys=trie.keys, stems=tuple(each.stem for each in level), width=message.width)
        grown: list[_Grown] = []
        for above, candidates in zip(level, session.guesses.expand(draft), strict=True):
            for candidate in candidates:
                if len(tokens) >= MAX_GUESSES:
                    break
                grown.append(_child(trie, above, candidate, len(tokens)))
                parents.append(above.index)
                tokens.append(candidate.token)
                centinats.append(round(-100 * max(candidate.logprob, _LEAST_LOGPROB)))
        level = sorted(grown, key=lambda each: -each.logprob)[: len(message.stems)]
        if not level:
            break
    return Drafted(
        draft=message.draft,
        number=message.number,
        parents=tuple(parents),
        tokens=tuple(tokens),
        centinats=tuple(max(0, each) for each in centinats),
    )


def _child(trie: _Trie, above: _Grown, candidate: Candidate, index: int) -> _Grown:
    key = trie.key_below(above.stem.key, candidate.token)
    stem = Stem(key=key, path=(*above.stem.path, (key, candidate.token)))
    return _Grown(index=index, stem=stem, logprob=above.logprob + candidate.logprob)


def _refusal(draft: bytes, number: int, why: str) -> Drafted:
    return Drafted(draft=draft, number=number, error=why[:512])
