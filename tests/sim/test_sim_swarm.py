"""Scenarios of peers that hold parts of a model: the live placement code gives each its layers and every request its chain."""

from pathlib import Path

import pytest

from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel, in_series
from dsd_p2p.sim.fleet import Fleet
from dsd_p2p.sim.policies import policy_maker
from dsd_p2p.sim.report import summarise
from dsd_p2p.sim.scenario_file import changed, parse_scenario

SCENARIO = """
seed = 5
layers = 6

[links.near]
latency = "2ms"

[links.far]
latency = "40ms"

[[drafters]]
count = 3
link = "near"
step = { fixed = "5ms" }

[[peers]]
count = 2
max_layers = 3
layer = { fixed = "2ms", per_node = "0.1ms" }
link = "near"
hidden_bytes = 1024
max_batch = 4

[[peers]]
count = 2
max_layers = 3
layer = { fixed = "2ms", per_node = "0.1ms" }
link = "far"
load = "200ms"
hidden_bytes = 1024
max_batch = 4

[workload]
requests = 30
rate = 2
prompt = { mean = 20 }
answer = { mean = 30 }

[acceptance]
rate = 0.8
"""
FIRST_PEER = SCENARIO.splitlines().index("[[peers]]") + 1


def fleet_of(text=SCENARIO, *, tell=None, is_recording=False, **changes):
    scenario = changed(
        parse_scenario(text, "test.toml"), {name.replace("__", "."): value for name, value in changes.items()}
    )
    return Fleet(scenario, policy_maker(scenario.speculation), tell=tell, is_recording=is_recording)


def test_every_layer_has_a_holder_and_every_answer_its_tokens():
    told = []
    fleet = fleet_of(tell=told.append, is_recording=True)
    spans = [node.span for node in fleet._machines.units]
    assert {layer for span in spans for layer in range(span.first, span.last)} == set(range(6))
    run = fleet.run()
    assert [log.num_tokens for log in run.logs] == [30] * 30
    assert (run.num_leaked, run.num_unfinished) == (0, 0)
    assert summarise(run).littles_law == pytest.approx(1, rel=0.02)
    assert {name for name, *_ in run.passes} <= {f"peer-{index}" for index in range(4)}
    statuses = [each for each in told if type(each).__name__ == "PeerStatus"]
    assert {(each.peer, each.first, each.last) for each in statuses} == {
        (f"peer-{index}", span.first, span.last) for index, span in enumerate(spans)
    }


def test_requests_go_where_the_chain_is_fastest():
    run = fleet_of(workload__rate=0.5).run()
    served = {
        name: sum(stage.num_served for stage in run.stages if stage.target == name) for name in ("peer-0", "peer-2")
    }
    # The near pair has all layers, and the far pair too: it is left alone while the near one is not busy.
    assert served["peer-0"] > 0
    assert served["peer-2"] == 0
    near = summarise(run).tpot_s.mean
    far = summarise(fleet_of(workload__rate=0.5, links__near__latency="40ms").run()).tpot_s.mean
    assert far > 2 * near


def test_load_spreads_over_what_there_is():
    run = fleet_of(workload__arrivals="closed", workload__concurrency=3, links__far__latency="3ms").run()
    assert all(sum(stage.num_served for stage in run.stages if stage.target == f"peer-{n}") for n in range(4))


def test_the_same_seed_gives_the_same_run():
    first, second = (
        [(log.first_s, log.finished_s, log.target) for log in fleet_of(churn__up="5s").run().logs] for _ in range(2)
    )
    assert first == second


def test_when_a_layer_loses_its_last_holder_another_peer_loads_it_and_the_text_goes_on():
    # Churn so rare that none happens by itself, and nobody comes back within the run.
    fleet = fleet_of(
        workload__arrivals="closed",
        workload__concurrency=3,
        churn__up="1000000s",
        churn__down="1000000s",
        churn__notice="100ms",
    )
    nodes = fleet._machines.units
    for node in nodes:
        if node.span.first == 0:
            fleet.clock.after(1.0, fleet._churn._fail, node)
    run = fleet.run()
    holders = [node.span for node in nodes if node.is_up]
    assert {layer for span in holders for layer in range(span.first, span.last)} == set(range(6))
    done = [log for log in run.logs if not log.error]
    assert sum(log.counts["num_replays"] for log in run.logs) > 0
    assert len(done) > 20
    assert all(log.num_tokens == 30 for log in done)


def test_a_request_counts_from_when_it_was_asked_for_though_layers_had_no_holder():
    fleet = fleet_of(
        workload__rate=20, peers__load="200ms", churn__up="1000000s", churn__down="1000000s", churn__notice="100ms"
    )
    for node in fleet._machines.units:
        if node.span.first == 0:
            fleet.clock.after(0.5, fleet._churn._fail, node)
    run = fleet.run()
    # It is noticed, and another peer loads three layers.
    served_again_s = 0.5 + 0.1 + 3 * 0.2
    waited = [log for log in run.logs if 0.5 < log.arrived_s < served_again_s]
    assert len(waited) > 3
    assert all(log.first_s > served_again_s for log in waited)
    assert summarise(run).littles_law == pytest.approx(1, rel=0.02)


def test_churn_leaks_nothing():
    run = fleet_of(churn__up="3s", churn__down="2s", churn__notice="200ms", workload__requests=60).run()
    assert (run.num_leaked, run.num_unfinished) == (0, 0)
    assert sum(log.counts["num_replays"] for log in run.logs) > 0


def test_two_links_in_a_row():
    first = LinkModel(latency_s=0.01, jitter_s=0.001, bandwidth_bps=1e6, loss=0.1)
    second = LinkModel(latency_s=0.02, loss=0.2, stall_every_s=9, stall_s=1)
    joined = in_series(first, second)
    assert joined.latency_s == pytest.approx(0.03)
    assert joined.bandwidth_bps == 1e6
    assert joined.loss == pytest.approx(0.28)
    assert (joined.stall_every_s, joined.stall_s) == (9, 1)
    assert in_series(LinkModel(), LinkModel()).is_ideal


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("layers = 6", "layers = 13", r"test\.toml:3: layers: is 13, expected 1 to 12"),
        ("layers = 6", "", r"layers: is 0, expected 1 to 12"),
        ("count = 2", "count = 65", rf"test\.toml:{FIRST_PEER}: peers\[0\]: expected at most 64 peers"),
        ('link = "far"', 'link = "moon"', r"peers\[1\]\.link: is 'moon', expected one of the \[links\]: near, far"),
        (
            "[workload]",
            "[speculation]\nrouting = 'random'\n[workload]",
            r"speculation\.routing: has no effect with peers",
        ),
        ("[workload]", "[speculation]\nmode = 'auto'\n[workload]", r"speculation: peers cannot draft"),
        (
            "[workload]",
            "[[targets]]\nstage = { fixed = '1ms' }\n[workload]",
            rf"test\.toml:{FIRST_PEER}: peers\[0\]: give either \[\[targets\]\], or \[\[peers\]\]",
        ),
        ("max_layers = 3", "", r"peers\[\.\.\.\]: Object missing required field `max_layers`|max_layers"),
    ],
)
def test_a_bad_swarm_is_named(old, new, what):
    with pytest.raises(ConfigError, match=what):
        parse_scenario(SCENARIO.replace(old, new, 1), "test.toml")


def test_the_swarm_of_the_docs_runs():
    text = Path("docs/scenarios/swarm.toml").read_text()
    run = fleet_of(text, workload__requests=8).run()
    assert run.num_unfinished == 0
