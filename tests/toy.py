"""A toy target without a model: its next token is a hash of everything a node attends to.

Its stages keep tokens where a real one keeps keys and values, and see exactly what the masks let them see. So a wrong mask,
slot, position or epoch changes the text.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from dsd_p2p.cache.slots import CacheEdit, Forward
from dsd_p2p.session.effects import Candidate, Draft, Emit, Finish, Replay, Send
from dsd_p2p.session.machine import RequestMachine
from dsd_p2p.session.request import Request, Route
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk, verdict_of
from dsd_p2p.types import ComputeFormat, Endpoint, ModelKey, PeerId, SessionId, Span, StageCost, TextRequest
from dsd_p2p.window.base import Decision
from dsd_p2p.window.static import StaticPolicy
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import BASE, FILL_NODES, Cancel, CloseSession, Hop, OpenSession, Verdict, Window

VOCAB = 7
COST = StageCost(us=1000, num_rows=1)
SESSION = SessionId(b"toy-sess")


def next_token(text: Sequence[int]) -> int:
    return hashlib.sha256(bytes(text)).digest()[0] % VOCAB


def plain_text(prompt: Sequence[int], num_tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(next_token(text))
    return text[len(prompt) :]


class ToyCache:
    """Applies edits and passes as a model's cache would."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    def edit(self, edit: CacheEdit | None) -> None:
        if edit is not None:
            self.slots = self.slots[: edit.num_kept] + [self.slots[i] for i in edit.gathered]

    def run(self, tokens: Sequence[int], forward: Forward) -> list[int]:
        self.slots += list(tokens)
        assert forward.mask.shape == (len(tokens), len(self.slots)) == (len(tokens), len(forward.slot_positions))
        picks = []
        for row, position in zip(forward.mask, forward.positions, strict=True):
            seen = np.flatnonzero(row)
            order = seen[np.argsort(forward.slot_positions[seen])]
            assert forward.slot_positions[order].tolist() == list(range(position + 1))
            picks.append(next_token([self.slots[i] for i in order]))
        return picks


TOY_MODEL = ModelKey(digest="toy", weights="float32", compute=ComputeFormat.FLOAT32)


class ToyStage:
    """`old` is what this peer holds of the session, which a kept stage goes on with."""

    def __init__(self, opened: OpenSession, index: int, old: "ToyStage | None" = None) -> None:
        self.opened = opened
        self.written: list[int] = []
        self.onward = opened.route[index + 1].peer if index + 1 < len(opened.route) else None
        self.is_kept = bool(opened.kept) and opened.kept[index]
        self.next_is_kept = bool(opened.kept) and self.onward is not None and opened.kept[index + 1]
        num_kept = opened.num_given - 1
        at = num_kept - 1 if self.is_kept else BASE
        is_tail = self.onward is None
        self.walk = None
        if is_tail:
            self.walk = TailWalk(epoch=opened.epoch, num_prompt=opened.num_prompt, num_given=opened.num_given, at=at)
        if not self.is_kept:
            self.state = StageState(epoch=opened.epoch, max_length=opened.max_length, max_speculative=1024)
            self.cache = ToyCache()
            return
        assert old is not None, "the coordinator thinks that we hold something"
        self.state, self.cache = old.state, old.cache
        for edit in self.state.resume(epoch=opened.epoch, at=opened.resume, num_kept=num_kept):
            self.cache.edit(edit)
        assert len(self.cache.slots) == num_kept

    def refill(self) -> list[Window]:
        """What the next stage lost; a toy's hidden states are the tokens themselves."""
        opened, slots = self.opened, self.cache.slots
        starts = range(0, len(slots), FILL_NODES)
        return [
            Window(
                session=SESSION,
                epoch=opened.epoch,
                window=number,
                root=(opened.epoch, start - 1),
                first_node=start,
                tokens=tuple(slots[start : start + FILL_NODES]),
                parents=tuple(range(start - 1, len(slots) - 1))[:FILL_NODES],
                positions=tuple(range(start, len(slots)))[:FILL_NODES],
            )
            for number, start in enumerate(starts)
        ]

    def window(self, window: Window) -> tuple[Window | None, Verdict | None]:
        """What a stage does with a window: what it forwards, what the tail answers."""
        if self.state.is_stale(window):
            return None, None
        live = self.walk.live(window) if self.walk else None
        step = self.state.accept(window, live)
        assert step is not None
        self.cache.edit(step.edit)
        offsets = range(len(window.tokens)) if live is None else live
        picks = self.cache.run([window.tokens[i] for i in offsets], step.forward) if step.forward else []
        if self.walk is None:
            is_given = window.epoch == self.opened.epoch and window.positions[-1] < self.opened.num_given - 1
            return (None if is_given and self.next_is_kept else window), None
        committed = self.walk.walk(window, list(offsets), picks.__getitem__, self.written.append)
        if not committed.tokens:
            return None, None
        return None, verdict_of(
            msgspec.structs.replace(window, costs=(COST, COST)),
            committed,
            num_live=len(offsets),
        )


def toy_route(num_stages: int, names: Sequence[str] | None = None) -> Route:
    names = names or [f"stage{i}" for i in range(num_stages)]
    hops = tuple(Hop(peer=name, address="", span=Span(i, i + 1)) for i, name in enumerate(names))
    return Route(hops=hops, model=TOY_MODEL, max_positions=1024)


Drafts = Callable[[Sequence[int], int], list[Candidate]]


class ToyNetwork:
    """RequestMachine and stages with one queue a link; `choose` picks which link delivers next: any interleaving."""

    def __init__(
        self,
        *,
        prompt: Sequence[int],
        num_tokens: int,
        num_stages: int,
        decision: Decision,
        drafts: Drafts,
        choose: Callable[[int], int],
        rng: Callable[[], float] = lambda: 0.5,
        prefill_chunk: int = 3,
        tracker: Tracker | None = None,
    ) -> None:
        self.route = toy_route(num_stages)
        rng_object = type("Rng", (), {"random": staticmethod(rng)})()
        self.machine = RequestMachine(
            Request(
                text=TextRequest(max_tokens=num_tokens),
                session=SESSION,
                prompt=prompt,
                vocab_size=VOCAB,
                coordinator=Endpoint("coordinator"),
                prefill_chunk=prefill_chunk,
            ),
            self.route,
            StaticPolicy(decision),
            tracker or Tracker(),
            rng_object,
        )
        self.drafts = drafts
        self.choose = choose
        self.stages: dict[str, ToyStage] = {}
        self.links: dict[tuple[str, str], deque[object]] = {}
        self.draft: Draft | None = None
        self.emitted: list[int] = []
        self.finish: Finish | None = None
        self.replay: Replay | None = None
        self.now_s = 0.0
        self.trace: list[object] = []

    def perform(self, effects: Sequence[object]) -> None:
        for effect in effects:
            assert self.finish is None, "nothing follows Finish"
            self.trace.append(effect)
            match effect:
                case Send(to=to, message=message):
                    source = "windows" if isinstance(message, Window | OpenSession) else "control"
                    self.links.setdefault((source, to), deque()).append(message)
                case Draft():
                    assert self.draft is None, "one draft at a time"
                    self.draft = effect
                case Emit(tokens=tokens):
                    self.emitted += tokens
                case Replay():
                    self.replay = effect
                case Finish():
                    self.finish = effect

    def step(self) -> bool:
        """Deliver one message or finish one draft; False when nothing can move."""
        self.now_s += 0.01
        ready = [link for link, queue in self.links.items() if queue]
        num_choices = len(ready) + (self.draft is not None)
        if self.finish or not num_choices:
            return False
        choice = self.choose(num_choices)
        if choice == len(ready):
            draft, self.draft = self.draft, None
            assert draft is not None
            texts = [[*draft.tokens, *(token for _, token in stem.path)] for stem in draft.stems]
            self.perform(self.machine.drafted([self.drafts(text, draft.width) for text in texts], self.now_s))
        else:
            link = ready[choice]
            self.deliver(link[1], self.links[link].popleft())
        return True

    def deliver(self, to: str, message: object) -> None:
        if to == "coordinator":
            assert isinstance(message, Verdict)
            self.perform(self.machine.receive(message, self.now_s))
            return
        stage = self.stages.get(to)
        match message:
            case OpenSession():
                index = next(i for i, hop in enumerate(message.route) if hop.peer == to)
                if stage is None or message.epoch > stage.state.epoch:
                    stage = self.stages[to] = ToyStage(message, index, stage)
                if stage.onward is not None:
                    link = self.links.setdefault(("windows", stage.onward), deque())
                    link.append(message)
                    link.extend(stage.refill() if stage.is_kept and not stage.next_is_kept else ())
            case Cancel(epoch=epoch) if stage is not None:
                stage.state.cancel(epoch)
            case CloseSession():
                self.stages.pop(to, None)
            case Window() if stage is not None:
                forwarded, verdict = stage.window(message)
                if forwarded is not None:
                    assert stage.onward is not None
                    self.links.setdefault(("windows", stage.onward), deque()).append(forwarded)
                if verdict is not None:
                    self.links.setdefault(("verdicts", "coordinator"), deque()).append(verdict)
            case _:
                pass

    def run(self, max_steps: int = 200_000) -> list[int]:
        self.perform(self.machine.start(self.now_s))
        for _ in range(max_steps):
            if not self.step():
                break
        return self.emitted


def peer(index: int) -> PeerId:
    return PeerId(f"stage{index}")
