"""The learned window policy: what it sees, what it says, that it changes no token and never costs much."""

import io
import math
from importlib.resources import files

import numpy as np
import pytest
from msgspec.structs import replace
from sim_routes import ROUTES, Perfect, Useless, route_of, tokens_per_s, write

from dsd_p2p.errors import ConfigError
from dsd_p2p.sim.agreement import read_agreement
from dsd_p2p.telemetry.events import DecisionMade, RateOf, SessionEnded, encode_event
from dsd_p2p.window.base import CostLine, MeasuredRate, Mode, Observation
from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.learned import Network
from dsd_p2p.window.learned.bundled import bundled_network, learned_policy
from dsd_p2p.window.learned.features import NAMES, features
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain
from dsd_p2p.window.tracker import Tracker
from node.lab.recorded import bundled_agreement
from node.lab.simulator.rater import train
from node.lab.simulator.samples import Sample
from node.lab.simulator.training import read_live


@pytest.fixture(scope="module")
def trace():
    return read_agreement(bundled_agreement())


def learned(modes=frozenset({Mode.SYNC, Mode.CONTINUOUS})):
    return learned_policy(modes)


def observation(**changes):
    values = {
        "stages": (CostLine(fixed_s=0.01, per_node_s=0.0005),) * 3,
        "links_s": 0.2,
        "draft": CostLine(fixed_s=0.006, per_node_s=0.0003),
        "hit_rate_by_rank": (0.7, 0.1, 0.05, *(0.01,) * 13),
        "num_outcomes": 100,
        "confidence": 0.8,
    }
    return Observation(**{**values, **changes})


def test_features_have_no_units_and_no_surprises():
    seen = features(observation(), PLAIN)
    assert seen.shape == (len(NAMES),)
    assert seen.dtype == np.float32
    assert np.isfinite(seen).all()
    # Everything ten times slower: only the first, the logarithm of the traversal, tells.
    slower = features(
        observation(
            stages=(CostLine(fixed_s=0.1, per_node_s=0.005),) * 3,
            links_s=2.0,
            draft=CostLine(fixed_s=0.06, per_node_s=0.003),
        ),
        PLAIN,
    )
    assert slower[0] - seen[0] == pytest.approx(np.log(10), abs=1e-4)
    assert slower[1:] == pytest.approx(seen[1:], abs=1e-5)
    odd = observation(
        draft=CostLine(fixed_s=0.0, per_node_s=0.0), hit_rate_by_rank=(), num_outcomes=0, queue_s=1e9, links_s=0.0
    )
    assert np.isfinite(features(odd, sync_chain(12))).all()


def test_the_network_is_what_torch_makes_of_its_weights():
    """The numpy forward against the layers it was trained as."""
    import torch
    from torch.nn import functional

    with np.load(io.BytesIO(files("dsd_p2p").joinpath("data/policy.npz").read_bytes())) as weights:
        inputs = np.random.default_rng(0).normal(size=len(NAMES)).astype(np.float32)

        def linear(values, name):
            return functional.linear(
                values, *(torch.from_numpy(weights[f"{name}.{part}"]) for part in ("weight", "bias"))
            )

        hidden = functional.silu(linear(torch.from_numpy((inputs - weights["mean"]) / weights["scale"]), "first"))
        for block in range(2):
            inner = functional.silu(linear(hidden, f"blocks.{block}.inner"))
            hidden = hidden + linear(inner, f"blocks.{block}.outer")
        expected = linear(functional.silu(hidden), "last").numpy()
    rated = bundled_network().rate(inputs)
    assert rated.shape == (len(CATALOGUE),)
    assert rated == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("change", ["version", "arms", "features", "junk", "missing"])
def test_weights_of_another_version_are_refused(change):

    data = files("dsd_p2p").joinpath("data/policy.npz").read_bytes()
    with np.load(io.BytesIO(data)) as stored:
        weights = {name: stored[name] for name in stored.files}
    match change:
        case "version":
            weights["version"] = np.array(99)
        case "arms" | "features":
            weights[change] = weights[change][:-1]
        case "missing":
            del weights["last.bias"]
        case _:
            pass
    buffer = io.BytesIO()
    np.savez(buffer, **weights)
    with pytest.raises(ConfigError, match="train"):
        Network.from_bytes(buffer.getvalue()[:900] if change == "junk" else buffer.getvalue())


@pytest.mark.parametrize("text", [0, 13, 24])
def test_it_writes_the_recorded_text(trace, text):
    request = write(trace, text, route_of(), learned(), Tracker(), 96)
    assert request.tokens == list(trace.texts[text].tokens[:96])


def test_it_keeps_to_the_modes_it_may_choose(trace):
    for modes in (frozenset({Mode.SYNC}), frozenset({Mode.CONTINUOUS}), frozenset()):
        policy, seen = learned(modes), set()
        for hits in (0.1, 0.5, 0.9):
            for _ in range(4):
                seen.add(policy.decide(observation(hit_rate_by_rank=(hits, *(0.01,) * 15))).mode)
        assert seen <= modes | {Mode.PLAIN}


def test_another_mode_has_to_be_wanted_twice():
    policy = learned()
    plain = observation(measured={PLAIN.kind: MeasuredRate(decision=PLAIN, tokens_per_s=4.0, num_tokens=50)})
    first = policy.decide(plain)
    assert first.mode is not Mode.PLAIN
    # Measured far below plain, which is measured too: it goes back, but not at once.
    slow = {
        PLAIN.kind: MeasuredRate(decision=PLAIN, tokens_per_s=4.0, num_tokens=50),
        **{
            decision.kind: MeasuredRate(decision=decision, tokens_per_s=0.5, num_tokens=50)
            for decision in CATALOGUE.values()
            if decision.mode is not Mode.PLAIN
        },
    }
    modes = [policy.decide(observation(measured=slow)).mode for _ in range(4)]
    assert modes[0] is first.mode
    assert modes[-1] is Mode.PLAIN


def test_wishes_for_another_mode_count_in_a_row_only():
    policy = learned()
    policy._current = CATALOGUE["sync-4"]
    policy._ratings = np.zeros(len(CATALOGUE), np.float32)

    def wish(name):
        rates = {decision.kind: 1.0 for decision in CATALOGUE.values()} | {CATALOGUE[name].kind: 9.0}
        policy._rates = lambda _ratings, _observation: rates
        return policy.decide(observation()).mode

    wishes = ("continuous-2x8-6", "sync-4", "continuous-2x8-6", "continuous-2x8-6")
    assert [wish(name) for name in wishes] == [Mode.SYNC, Mode.SYNC, Mode.SYNC, Mode.CONTINUOUS]


@pytest.mark.parametrize("chain", ROUTES[::3])
def test_a_useless_drafter_costs_next_to_nothing(trace, chain):
    plain = tokens_per_s(trace, chain, lambda: StaticPolicy(PLAIN))
    tracker = Tracker()
    first = tokens_per_s(trace, chain, learned, texts=(0,), drafts=Useless(), tracker=tracker)
    later = tokens_per_s(trace, chain, learned, texts=(12, 24, 1, 13), drafts=Useless(), tracker=tracker)
    assert first >= 0.75 * plain
    assert later >= 0.97 * plain


@pytest.mark.parametrize("chain", ROUTES[::3])
def test_a_perfect_drafter_is_put_to_use(trace, chain):
    plain = tokens_per_s(trace, chain, lambda: StaticPolicy(PLAIN))
    rate = tokens_per_s(trace, chain, learned, drafts=Perfect())
    assert rate >= 0.97 * plain
    if chain.draft.at(1) < 0.5 / plain:
        assert rate > 1.5 * plain


def test_it_is_close_to_the_best_window_of_the_catalogue(trace):
    """Regret on chains that no scenario of the training has: after one text, against the best fixed window in hindsight."""
    regrets = []
    for num_stages, link_s, stage_s in ((2, 0.01, 0.01), (3, 0.05, 0.01), (5, 0.03, 0.02), (4, 0.1, 0.005)):
        chain = route_of(num_stages, link_s=link_s, stage_s=stage_s, node_s=stage_s / 20, draft_s=0.012)
        fixed = [tokens_per_s(trace, chain, lambda d=decision: StaticPolicy(d)) for decision in CATALOGUE.values()]
        tracker = Tracker()
        tokens_per_s(trace, chain, learned, texts=(1,), tracker=tracker)
        regrets.append(1 - tokens_per_s(trace, chain, learned, tracker=tracker) / max(fixed))
    assert sorted(regrets)[len(regrets) // 2] <= 0.25


def test_recordings_of_live_runs_are_labels_of_what_was_measured(tmp_path):
    fast, slow = CATALOGUE["sync-4"], CATALOGUE["continuous-2x8-6"]
    told = DecisionMade(
        decision=fast.kind,
        features=(0.25,) * len(NAMES),
        measured=(
            RateOf(kind=PLAIN.kind, tokens_per_s=2.0, num_tokens=50),
            RateOf(kind=fast.kind, tokens_per_s=8.0, num_tokens=50),
            RateOf(kind=slow.kind, tokens_per_s=1.0, num_tokens=3),
            RateOf(kind="of another version", tokens_per_s=9.0, num_tokens=99),
        ),
    )
    useless = [replace(told, measured=told.measured[1:]), replace(told, features=(1.0,)), SessionEnded()]
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"\n".join([encode_event(event) for event in (told, *useless)] + [b"junk"]))
    (sample,) = read_live(file)
    arms = list(CATALOGUE)
    assert sample.inputs.shape == (1, len(NAMES))
    assert sample.label[arms.index("plain")] == 0.0
    assert sample.label[arms.index("sync-4")] == pytest.approx(math.log(4))
    assert np.isfinite(sample.label).sum() == 2, "three tokens measure nothing"
    whole = [
        Sample(
            inputs=np.random.default_rng(seed).normal(size=(2, len(NAMES))).astype(np.float32),
            label=np.zeros(len(arms), np.float32),
        )
        for seed in range(20)
    ]
    weights, losses = train([*whole, *([sample] * 20)], num_epochs=120, seed=0)
    assert all(map(math.isfinite, losses))
    rated = Network(weights).rate(sample.inputs[0])
    assert rated[arms.index("sync-4")] > 0.2 + abs(rated[arms.index("plain")]), "learned where it is known"
    with pytest.raises(ConfigError, match="recording"):
        read_live(tmp_path / "nothing")
