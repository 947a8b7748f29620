"""The core under every interleaving: whatever is drafted and in whatever order messages travel, the text is the target's."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import SESSION, TOY_MODEL, VOCAB, ToyNetwork, ToyStage, plain_text, toy_route
from toy_drafts import TREE, drafter

from dsd_p2p.errors import CapacityError, DsdError, ModelError, PeerDisconnected, RemoteProtocolError
from dsd_p2p.session.effects import Draft, Emit, Finish, Replay, Send
from dsd_p2p.session.stage import StageState
from dsd_p2p.session.tail import TailWalk
from dsd_p2p.types import Endpoint, StageCost, TextRequest
from dsd_p2p.window.base import Decision, Mode
from dsd_p2p.window.static import PLAIN, continuous_tree, sync_chain
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.messages import BASE, Cancel, CloseSession, OpenSession, Verdict, Window

DECISIONS = [
    PLAIN,
    sync_chain(1),
    sync_chain(4),
    Decision(mode=Mode.SYNC, depth=4, width=2, expand_nodes=2, window_nodes=9, max_nodes=8),
    continuous_tree(depth=12, width=1, window_nodes=1, max_in_flight=6),
    continuous_tree(depth=12, width=3, window_nodes=4, max_in_flight=6),
    continuous_tree(depth=6, width=2, window_nodes=2, max_in_flight=2),
]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    decision=st.sampled_from(DECISIONS),
    num_stages=st.integers(1, 4),
    accuracy=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    num_tokens=st.integers(1, 40),
)
def test_every_mode_writes_the_targets_own_text(seed, decision, num_stages, accuracy, prompt, num_tokens):
    rng = random.Random(seed)
    network = ToyNetwork(
        prompt=prompt,
        num_tokens=num_tokens,
        num_stages=num_stages,
        decision=decision,
        drafts=drafter(accuracy, rng),
        choose=rng.randrange,
    )
    assert network.run() == plain_text(prompt, num_tokens)
    assert network.finish is not None
    assert network.finish.reason == "length"
    assert network.finish.error is None
    while network.step():
        pass
    sent_windows = [e.message for e in network.trace if isinstance(e, Send) and isinstance(e.message, Window)]
    assert [w.window for w in sent_windows] == list(range(len(sent_windows)))
    assert any(isinstance(e, Draft) for e in network.trace) == (decision.mode is not Mode.PLAIN and num_tokens > 1)


def network_of(
    decision: Decision, *, accuracy: float = 0.8, seed: int = 0, num_tokens: int = 30, is_measured: bool = True
) -> ToyNetwork:
    rng = random.Random(seed)
    tracker = Tracker()
    if is_measured:
        tracker.verdict(traversal_s=0.0, costs=[StageCost(us=0, num_rows=1)] * 3, waited_s=0.0)
    return ToyNetwork(
        prompt=[1, 2, 3, 4, 5],
        num_tokens=num_tokens,
        num_stages=3,
        decision=decision,
        drafts=drafter(accuracy, rng),
        choose=rng.randrange,
        tracker=tracker,
    )


@pytest.mark.parametrize(("decision", "most_stems"), [(sync_chain(4), 1), (TREE, TREE.expand_nodes)])
def test_a_draft_step_is_measured_by_its_stems_and_not_the_first_which_reads_the_prompt(
    decision, most_stems, monkeypatch
):
    network, sampled, answered = network_of(decision), [], []
    drafted = network.machine.drafted
    monkeypatch.setattr(Tracker, "draft_step", lambda _tracker, stems, seconds: sampled.append((stems, seconds)))
    monkeypatch.setattr(network.machine, "drafted", lambda *args: (answered.append(args), drafted(*args))[1])
    network.run()
    assert len(sampled) == len(answered) - 1 > 10
    assert [stems for stems, _ in sampled] == [len(children) for children, _ in answered[1:]]
    assert max(stems for stems, _ in sampled) == most_stems


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), decision=st.sampled_from(DECISIONS), data=st.data())
def test_duplicated_stale_and_reordered_verdicts_change_nothing(seed, decision, data):
    """Verdicts are delivered in any order, several times, old ones again: no token twice, none lost, it ends."""
    network = network_of(decision, seed=seed)
    rng = random.Random(seed)
    seen: list[Verdict] = []
    original = network.deliver

    def deliver(to: str, message: object) -> None:
        if to != "coordinator":
            original(to, message)
            return
        seen.append(message)
        for verdict in [*rng.sample(seen, k=min(len(seen), rng.randrange(3))), message]:
            if network.finish is None:
                before = len(network.machine.tokens)
                original(to, verdict)
                assert len(network.machine.tokens) >= before

    network.deliver = deliver
    assert network.run() == plain_text([1, 2, 3, 4, 5], 30)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), decision=st.sampled_from(DECISIONS))
def test_duplicated_and_stale_windows_change_nothing_at_the_stages(seed, decision):
    """A stage that gets a window twice, or one from an earlier epoch again, stays as it was."""
    network = network_of(decision, seed=seed)
    rng = random.Random(seed)
    old: list[Window] = []
    original = network.deliver

    def deliver(to: str, message: object) -> None:
        original(to, message)
        if to != "stage0" or not isinstance(message, Window):
            return
        old.append(message)
        stage = network.stages["stage0"]
        if stage is not None:
            assert stage.window(rng.choice(old)) == (None, None)

    network.deliver = deliver
    assert network.run() == plain_text([1, 2, 3, 4, 5], 30)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), decision=st.sampled_from([PLAIN, sync_chain(4), TREE]))
def test_hostile_verdicts_are_refused_and_never_emitted(data, seed, decision):
    """Any verdict a tail can make up is either ignored, refused with its field, or was what the tail would say."""
    network = network_of(decision, seed=seed)
    expected = plain_text([1, 2, 3, 4, 5], 30)
    network.perform(network.machine.start(0.0))
    for _ in range(data.draw(st.integers(0, 60))):
        network.step()
    small = st.integers(0, 60)
    tokens = tuple(data.draw(st.lists(st.integers(0, VOCAB + 2), min_size=1, max_size=5)))
    forged = Verdict(
        session=SESSION,
        epoch=data.draw(small),
        window=data.draw(small),
        start_pos=data.draw(small),
        tokens=tokens,
        settled=tuple(data.draw(st.lists(st.integers(-1, 60), min_size=1, max_size=5))),
    )
    before = list(network.machine.tokens)
    try:
        effects = network.machine.receive(forged, 1.0)
    except RemoteProtocolError as exc:
        assert exc.field
        assert exc.limit
        return
    assert network.machine.tokens[: len(before)] == before, "positions only grow"
    emitted = [token for effect in effects if isinstance(effect, Emit) for token in effect.tokens]
    assert network.machine.tokens[len(before) :] == emitted
    assert len(network.emitted) + len(emitted) <= len(expected)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_hostile_windows_meet_a_typed_error_and_leave_the_stage_sound(data, seed):
    """Whatever a window claims, a stage refuses it by field, drops it, or runs it with sound masks.

    One that is refused ends the session there; over other stages the text goes on as if nothing had happened.
    """
    network = network_of(TREE, seed=seed)
    network.perform(network.machine.start(0.0))
    for _ in range(data.draw(st.integers(2, 50))):
        network.step()
    assume(network.stages)
    stage = network.stages[data.draw(st.sampled_from(sorted(network.stages)))]
    count = data.draw(st.integers(1, 4))
    small = st.integers(-1, 40)
    window = Window(
        session=SESSION,
        epoch=max(0, stage.state.epoch + data.draw(st.integers(-1, 2))),
        window=data.draw(st.integers(0, 200)),
        root=(max(0, stage.state.epoch + data.draw(st.integers(-1, 1))), data.draw(small)),
        first_node=max(0, data.draw(small)),
        tokens=tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))),
        parents=tuple(data.draw(st.lists(small, min_size=count, max_size=count))),
        positions=tuple(data.draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))),
    )
    try:
        stage.window(window)
    except (RemoteProtocolError, CapacityError) as exc:
        assert getattr(exc, "field", "nodes") in str(exc)
        network.perform(network.machine.failed(stage.state.epoch, PeerDisconnected(str(exc)), network.now_s))
        if network.replay is not None:
            network.perform(network.machine.reopen(toy_route(3, ["x", "y", "z"]), network.now_s))
        for _ in range(5000):
            if not network.step():
                break
        assert network.emitted == plain_text([1, 2, 3, 4, 5], 30)


def open_message(**changes: object) -> OpenSession:
    values = {
        "session": SESSION,
        "epoch": 0,
        "route": toy_route(1).hops,
        "coordinator": Endpoint("coordinator"),
        "model": TOY_MODEL,
        "text": TextRequest(max_tokens=18),
        "num_prompt": 2,
        "num_given": 2,
        "idle_timeout_s": 1.0,
    }
    return OpenSession(**{**values, **changes})


def window(number: int, epoch: int, root: tuple[int, int], first: int, nodes: list[tuple[int, int, int]]) -> Window:
    tokens, parents, positions = zip(*nodes, strict=True)
    return Window(
        session=SESSION,
        epoch=epoch,
        window=number,
        root=root,
        first_node=first,
        tokens=tokens,
        parents=parents,
        positions=positions,
    )


def test_the_tail_commits_the_correction_and_the_bonus_token():
    """Two right guesses and a wrong one: three tokens are committed, the third is the target's own."""
    text = [1, 2]
    truth = [*text, *plain_text(text, 3)]
    wrong = (truth[4] + 1) % VOCAB
    stage = ToyStage(open_message(), 0)
    nodes = [(1, BASE, 0), (2, 0, 1), (truth[2], 1, 2), (truth[3], 2, 3), (wrong, 3, 4)]
    _, verdict = stage.window(window(0, 0, (0, BASE), 0, nodes))
    assert verdict is not None
    assert verdict.start_pos == 2
    assert list(verdict.tokens) == truth[2:5]
    assert list(verdict.settled) == [2, 3, BASE]

    stage = ToyStage(open_message(), 0)
    _, verdict = stage.window(window(0, 0, (0, BASE), 0, nodes[:4]))
    assert verdict is not None
    assert list(verdict.tokens) == truth[2:5], "the bonus token comes with a fully accepted window"


def test_a_late_sibling_takes_the_walk_on_without_a_new_epoch():
    text = [1, 2]
    truth = [*text, *plain_text(text, 3)]
    wrong = (truth[2] + 1) % VOCAB
    stage = ToyStage(open_message(), 0)
    _, first = stage.window(window(0, 0, (0, BASE), 0, [(1, BASE, 0), (2, 0, 1), (wrong, 1, 2)]))
    assert first is not None
    assert list(first.tokens) == truth[2:3]
    _, stale = stage.window(window(1, 0, (0, 1), 3, [(0, 2, 3)]))
    assert stale is None, "nothing below the wrong token is worth a verdict"
    _, second = stage.window(window(2, 0, (0, 1), 4, [(truth[2], 1, 2)]))
    assert second is not None
    assert (second.start_pos, list(second.tokens)) == (3, truth[3:4])


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ({"epoch": 3}, "epoch"),
        ({"first_node": 7}, "first_node"),
        ({"root": (0, 9)}, "root"),
        ({"parents": (5,)}, "parent"),
        ({"positions": (9,)}, "position"),
        ({"positions": (20,)}, "position"),
        ({"epoch": 1, "root": (1, 0)}, "first_node"),
    ],
)
def test_a_stage_names_what_is_wrong(broken, field):
    import msgspec

    state = StageState(epoch=0, max_length=20, max_speculative=30)
    state.accept(window(0, 0, (0, BASE), 0, [(1, BASE, 0), (2, 0, 1)]))
    with pytest.raises(RemoteProtocolError) as caught:
        state.accept(msgspec.structs.replace(window(1, 0, (0, 0), 2, [(3, 1, 2)]), **broken))
    assert caught.value.field == field
    assert state.accept(window(1, 0, (0, 0), 2, [(3, 1, 2)])) is not None, "an honest window still goes through"


def test_a_session_cannot_outgrow_its_slots():
    state = StageState(epoch=0, max_length=20, max_speculative=3)
    with pytest.raises(CapacityError, match="4 nodes would wait below the root, at most 3 may"):
        state.accept(window(0, 0, (0, BASE), 0, [(1, BASE, 0), (2, 0, 1), (3, 1, 2), (4, 2, 3)]))


def test_cancel_drops_queued_windows_of_older_epochs():
    state = StageState(epoch=0, max_length=20, max_speculative=30)
    state.accept(window(0, 0, (0, BASE), 0, [(1, BASE, 0), (2, 0, 1)]))
    state.cancel(1)
    assert state.is_stale(window(1, 0, (0, 1), 2, [(3, 1, 2)]))
    opened = state.accept(window(2, 1, (0, 1), 0, [(4, BASE, 2)]))
    assert opened is not None
    assert opened.forward is not None
    assert opened.forward.slot_positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("is_measured", "most"), [(True, TREE.max_in_flight), (False, 5)])
def test_windows_overlap(is_measured, most):
    """The continuous mode's reason to exist: windows leave before the verdicts of earlier ones are back.

    Behind the two of the prompt only three before the first verdict: nobody knows yet at what pace stages take them.
    """
    network = network_of(TREE, accuracy=1.0, is_measured=is_measured)
    network.perform(network.machine.start(0.0))
    for _ in range(10):
        if network.draft is not None:
            draft, network.draft = network.draft, None
            texts = [[*draft.tokens, *(token for _, token in stem.path)] for stem in draft.stems]
            network.perform(network.machine.drafted([network.drafts(t, draft.width) for t in texts], 0.0))
    assert network.machine.stats.max_windows_in_flight == most
    assert network.emitted == []


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    decision=st.sampled_from(DECISIONS),
    losses=st.lists(st.tuples(st.integers(0, 120), st.sets(st.integers(0, 2))), min_size=1, max_size=3),
)
def test_a_lost_chain_goes_on_without_a_wrong_or_repeated_token(seed, decision, losses):
    """Whichever stages are lost, whatever still travels: those that are left go on with what they hold, the text is the same."""
    network = network_of(decision, seed=seed)
    network.perform(network.machine.start(0.0))
    names = ["stage0", "stage1", "stage2"]
    for number, (steps, lost) in enumerate(losses):
        for _ in range(steps):
            network.step()
        if network.finish is not None:
            break
        network.perform(network.machine.lost(PeerDisconnected("stages died"), network.now_s))
        assert network.replay is not None
        network.replay = None
        for index in lost:
            network.stages.pop(names[index], None)
            network.links = {link: queue for link, queue in network.links.items() if link[1] != names[index]}
            names[index] = f"stage{index} after {number}"
        # What a stage sent to one that is lost, or to one that has another neighbour now, is gone or dropped by its receiver.
        network.links = {link: queue for link, queue in network.links.items() if link[0] != "windows"}
        network.perform(network.machine.reopen(toy_route(3, names), network.now_s))
    while network.step():
        pass
    assert network.emitted == plain_text([1, 2, 3, 4, 5], 30)
    assert network.finish is not None


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}])
@pytest.mark.parametrize("decision", [PLAIN, TREE])
def test_only_what_is_lost_is_computed_again(decision, lost):
    network = network_of(decision, accuracy=0.7)
    network.perform(network.machine.start(0.0))
    while len(network.emitted) < 15:
        network.step()
    before = {name: stage.cache for name, stage in network.stages.items()}
    network.perform(network.machine.lost(PeerDisconnected("stages died"), network.now_s))
    names = [f"new{i}" if i in lost else f"stage{i}" for i in range(3)]
    for index in lost:
        network.stages.pop(f"stage{index}")
    network.links.clear()
    network.perform(network.machine.reopen(toy_route(3, names), network.now_s))
    num_given = len(network.machine.tokens) - 1
    while network.step() and network.finish is None:
        if all(name in network.stages for name in names):
            for name in names:
                assert (network.stages[name].cache is before.get(name)) == name.startswith("stage")
    stats = network.machine.stats
    assert (stats.num_replays, stats.num_resumes) == (1, 1)
    # The coordinator gives tokens again only to a head that lost them.
    assert stats.num_prefill_tokens == 4 + (num_given if 0 in lost else 0)
    assert network.emitted == plain_text([1, 2, 3, 4, 5], 30)


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}])
def test_a_refill_in_more_windows_than_the_prompt_came_in_hides_none_of_the_next(lost, monkeypatch):
    """A stage drops window numbers that it has seen: the coordinator's next must be above those of any refill."""
    for module in ("toy", "dsd_p2p.session.flight"):
        monkeypatch.setattr(f"{module}.FILL_NODES", 2)
    prompt = list(range(1, 30))
    network = ToyNetwork(
        prompt=prompt,
        num_tokens=10,
        num_stages=3,
        decision=PLAIN,
        drafts=drafter(0.7, random.Random(0)),
        choose=random.Random(0).randrange,
        tracker=Tracker(),
        prefill_chunk=29,
    )
    network.perform(network.machine.start(0.0))
    while not network.emitted:
        network.step()
    network.perform(network.machine.lost(PeerDisconnected("stages died"), network.now_s))
    names = [f"new{i}" if i in lost else f"stage{i}" for i in range(3)]
    network.links.clear()
    network.perform(network.machine.reopen(toy_route(3, names), network.now_s))
    while network.step():
        pass
    assert network.emitted == plain_text(prompt, 10)


def test_replays_are_bounded():
    network = network_of(PLAIN)
    network.perform(network.machine.start(0.0))
    for _ in range(10):
        network.perform(network.machine.lost(PeerDisconnected("down"), 0.0))
        if network.finish is not None:
            break
        network.perform(network.machine.reopen(toy_route(3), 0.0))
    assert network.finish is not None
    assert isinstance(network.finish.error, PeerDisconnected)
    assert network.machine.stats.num_replays == 3


@pytest.mark.parametrize("error", [CapacityError("full"), ModelError("broken"), RemoteProtocolError("x", 1, "2")])
def test_what_the_same_stages_would_do_again_is_tried_elsewhere_or_ends_the_request(error: DsdError):
    network = network_of(PLAIN)
    network.perform(network.machine.start(0.0))
    assert [type(effect) for effect in network.machine.lost(error, 0.0)] == [Replay]
    effects = network.machine.route_not_found(PeerDisconnected("no other"), 0.0)
    assert [type(e.message) for e in effects if isinstance(e, Send)] == [CloseSession] * 3
    assert isinstance(effects[-1], Finish)
    assert effects[-1].error is error


def test_silence_past_the_deadline_is_a_lost_chain():
    network = network_of(PLAIN)
    network.perform(network.machine.start(5.0))
    # The prompt's nodes may take a tenth of a second each: a long prompt takes minutes on slow machines.
    until_s = 65.0 + 0.1 * network.machine.stats.num_nodes_sent
    assert network.machine.deadline_s == pytest.approx(until_s)
    assert network.machine.wake(until_s - 0.01) == []
    assert any(isinstance(effect, Replay) for effect in network.machine.wake(until_s + 0.01))


def test_a_miss_cancels_what_is_in_flight_at_every_stage():
    network = network_of(
        continuous_tree(depth=12, width=1, window_nodes=1, max_in_flight=6), accuracy=0.0, num_tokens=10
    )
    network.run()
    cancels = [e for e in network.trace if isinstance(e, Send) and isinstance(e.message, Cancel)]
    assert {e.to for e in cancels} == {"stage0", "stage1", "stage2"}


def test_the_walk_refuses_an_epoch_off_its_path():
    walk = TailWalk(epoch=0, num_prompt=1, num_given=1)
    first = window(0, 0, (0, BASE), 0, [(1, BASE, 0)])
    walk.walk(first, walk.live(first), lambda _row: 5, lambda _token: None)
    with pytest.raises(RemoteProtocolError, match="root"):
        walk.live(window(1, 1, (0, 3), 0, [(5, BASE, 1)]))
