"""DSD-Sim: the same core as live, laws of queues, invariants of every run, scenarios that say what is wrong with them."""

import itertools
import json
import random
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from swarms import memory_swarm

from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel, LinkState
from dsd_p2p.sim.agreement import read_agreement
from dsd_p2p.sim.answer import AgreementModel, ParametricAnswer, RecordedAnswer
from dsd_p2p.sim.clock import Clock
from dsd_p2p.sim.fleet import Fleet
from dsd_p2p.sim.policies import policy_maker
from dsd_p2p.sim.report import chrome_trace, rows, summarise
from dsd_p2p.sim.request import RequestRun
from dsd_p2p.sim.route import RouteModel, simulate_request
from dsd_p2p.sim.scenario_file import changed, parse_scenario
from dsd_p2p.sim.service import PassCost, SharedCores
from dsd_p2p.sim.target import Batching
from dsd_p2p.sim.workload import arrivals
from dsd_p2p.stage import server as stage_server
from dsd_p2p.telemetry.events import decode_event, encode_event
from dsd_p2p.telemetry.picture import Picture
from dsd_p2p.types import Span
from dsd_p2p.window.static import PLAIN, StaticPolicy, continuous_tree, sync_chain, sync_tree
from dsd_p2p.window.tracker import Tracker
from dsd_p2p.wire.codec import decode
from dsd_p2p.wire.messages import Verdict, Window
from node.lab.recorded import RecordedDrafter, RecordedSpan, ServiceTimes, bundled_agreement
from node.lab.simulator.simulation import grid, sweep

SCENARIO = """
seed = 3
[links.edge]
latency = "5ms"
[links.inner]
latency = "2ms"
[[drafters]]
count = 20
link = "edge"
step = { fixed = "4ms" }
[[targets]]
count = 2
stage = { fixed = "20ms", per_node = "0.1ms" }
max_batch = 8
draft_step = { fixed = "2ms" }
[workload]
requests = 120
rate = 8
prompt = { mean = 40, variation = 1 }
answer = { mean = 30, variation = 0.5 }
[acceptance]
rate = 0.8
"""

QUEUE = """
seed = 1
links.none = {}
[[drafters]]
count = 500
link = "none"
step = {}
[[targets]]
stage = { fixed = "100ms" }
[workload]
requests = 30000
rate = 7
prompt = { mean = 1 }
answer = { mean = 1 }
[speculation]
window = "plain"
"""


def simulate(text=SCENARIO, is_recording=False, **changes):
    scenario = parse_scenario(text, "test.toml")
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    scenario = changed(scenario, changes) if changes else scenario
    return Fleet(scenario, policy_maker(scenario.speculation), is_recording=is_recording).run()


# The same core


NODE_S = 0.000317


class VirtualWork:
    """Service times on trio's virtual clock, in place of worker threads."""

    def __init__(self, monkeypatch):
        self.pending_s = 0.0
        monkeypatch.setattr(trio.to_thread, "run_sync", self.run_sync)
        monkeypatch.setattr(stage_server.StageServer, "__init__", self._with_clock(stage_server.StageServer.__init__))

    def _with_clock(self, original):
        def init(server, *arguments, **options):
            original(server, *arguments, **options)
            server.work._clock = lambda: trio.current_time() + self.pending_s

        return init

    async def run_sync(self, function, *arguments, **_options):
        result = function(*arguments)
        seconds, self.pending_s = self.pending_s, 0.0
        await trio.sleep(seconds)
        return result


class VirtualSpan(RecordedSpan):
    def __init__(self, work, stage_s, *arguments):
        super().__init__(*arguments)
        self._work, self._stage_s = work, stage_s

    def run(self, passes):
        self._work.pending_s += self._stage_s + NODE_S * sum(each.num_rows for each in passes)
        return super().run(passes)


class VirtualDrafter(RecordedDrafter):
    def __init__(self, work, trace, draft_s):
        super().__init__(trace, 0.0)
        self._work, self._virtual_s = work, draft_s

    def expand(self, draft):
        self._work.pending_s += self._virtual_s
        return super().expand(draft)


def described(message):
    if isinstance(message, Window):
        # The prompt's only token names the text, which the simulator is told otherwise.
        tokens = (0, *message.tokens[1:]) if message.positions[0] == 0 else message.tokens
        return (message.epoch, message.window, message.root, message.first_node, tokens, message.parents)
    return (message.epoch, message.window, message.start_pos, message.tokens, message.settled, message.num_stale)


@pytest.mark.parametrize(
    "decision",
    [
        PLAIN,
        sync_chain(4),
        sync_tree(16, depth=3),
        continuous_tree(depth=32, width=1, window_nodes=2, max_in_flight=4),
        continuous_tree(depth=32, width=4, window_nodes=8, max_in_flight=64, min_path_prob=0.001),
    ],
    ids=["plain", "sync", "sync-tree", "chain", "tree"],
)
@pytest.mark.parametrize("text", [0, 13])
async def test_live_and_simulated_runs_send_the_same_windows_and_verdicts(decision, text, monkeypatch, autojump_clock):
    """Over the memory transport, in virtual time, with service times that never coincide."""
    trace = read_agreement(bundled_agreement())
    link, stage_s, draft_s = LinkModel(latency_s=0.0301931), (0.0071237, 0.0113539), 0.0171413
    work = VirtualWork(monkeypatch)
    times = ServiceTimes(trace="", stage_s=0.0, node_s=0.0)
    spans = [Span(0, 1), Span(1, 2)]
    stages = [VirtualSpan(work, seconds, span, 2, times, trace) for span, seconds in zip(spans, stage_s, strict=True)]
    async with memory_swarm(
        stages,
        VirtualDrafter(work, trace, draft_s),
        vocab_size=trace.vocab_size,
        num_layers=2,
        spans=spans,
        link=link,
    ) as swarm:
        # The stages meet on the first request.
        await swarm.write([text], 3, PLAIN)
        sent = []
        for transport in swarm.network.transports.values():
            original = transport.send

            async def send(to, frame, original=original, source=transport.peer):
                message, _ = decode(frame)
                if (isinstance(message, Window) and source == "coordinator") or isinstance(message, Verdict):
                    sent.append((type(message).__name__, described(message)))
                await original(to, frame)

            transport.send = send
        tokens, _ = await swarm.write([text], 60, decision)
    chain = RouteModel(
        stages=tuple(PassCost.line(seconds, NODE_S) for seconds in stage_s),
        link=link,
        draft=PassCost.line(draft_s, 0.0),
    )
    answer, tracker = RecordedAnswer(trace.texts[text], 1, trace.vocab_size), Tracker()
    simulate_request(answer, chain, StaticPolicy(PLAIN), tracker, 3)
    simulated = []
    send_window, take_verdict = RequestRun._send, RequestRun.verdict

    def spy_send(run, message):
        if isinstance(message, Window):
            simulated.append(("Window", described(message)))
        send_window(run, message)

    def spy_verdict(run, verdict, session):
        simulated.append(("Verdict", described(verdict)))
        take_verdict(run, verdict, session)

    monkeypatch.setattr(RequestRun, "_send", spy_send)
    monkeypatch.setattr(RequestRun, "verdict", spy_verdict)
    request = simulate_request(answer, chain, StaticPolicy(decision), tracker, 60)
    assert request.tokens == tokens == list(trace.texts[text].tokens[:60])
    live_windows, sim_windows = ([each for each in log if each[0] == "Window"] for log in (sent, simulated))
    live_verdicts, sim_verdicts = ([each for each in log if each[0] == "Verdict"] for log in (sent, simulated))
    assert sim_verdicts == live_verdicts
    # The last window may leave at the very moment at which the last verdict makes it useless.
    assert abs(len(sim_windows) - len(live_windows)) <= 1
    shorter = min(len(sim_windows), len(live_windows))
    assert sim_windows[:shorter] == live_windows[:shorter]


# Laws


@pytest.mark.parametrize(("spread", "expected_s"), [("exponential", 0.1 / 0.3), ("none", 0.1 + 0.7 * 0.1 / (2 * 0.3))])
def test_one_queue_is_an_m_m_1_or_an_m_d_1(spread, expected_s):
    report = summarise(simulate(QUEUE, targets__spread=spread))
    assert report.total_s.mean == pytest.approx(expected_s, rel=0.04)
    assert report.stages[0]["busy_share"] == pytest.approx(0.7, rel=0.02)
    # Waiting alone, by Little: arrival rate times the mean wait.
    assert report.stages[0]["mean_queue"] == pytest.approx(7 * (report.total_s.mean - 0.1), rel=0.02)
    assert report.littles_law == pytest.approx(1, rel=0.02)


def test_a_server_with_work_never_rests(tmp_path):
    """All come at once: the last is done after exactly as much time as there is work."""
    trace = tmp_path / "arrivals.jsonl"
    line = json.dumps({"arrival_s": 0.0, "prompt_tokens": 1, "answer_tokens": 1})
    trace.write_text("\n".join([line] * 50))
    run = simulate(QUEUE, workload__arrivals="trace", workload__file=str(trace), workload__requests=50)
    assert max(log.finished_s for log in run.logs) == pytest.approx(50 * 0.1)
    assert run.stages[0].num_served == 50


VARIANTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 40),
        "speculation.policy": st.sampled_from(["plain", "static", "tree", "threshold", "analytic", "learned"]),
        "speculation.mode": st.sampled_from(["distributed", "auto", "fused"]),
        "speculation.placement": st.sampled_from(["drafter", "target"]),
        "speculation.routing": st.sampled_from(["random", "round-robin", "jsq", "power-of-two", "predicted-time"]),
        "targets.batching": st.sampled_from(list(Batching)),
        "targets.stages": st.integers(1, 3),
        "targets.max_batch": st.sampled_from([1, 4, 16]),
        "targets.cores": st.sampled_from([0, 1, 2]),
        "workload.arrivals": st.sampled_from(["poisson", "gamma", "closed"]),
        "links.edge.latency": st.sampled_from(["0ms", "3ms", "60ms"]),
        "links.edge.jitter": st.sampled_from(["0ms", "2ms"]),
        "links.edge.loss": st.sampled_from([0.0, 0.05]),
        "links.edge.stall_every": st.sampled_from(["0s", "1s"]),
        "links.edge.stall": st.sampled_from(["50ms"]),
        "acceptance.rate": st.sampled_from([0.05, 0.6, 0.97]),
        "churn.up": st.sampled_from(["0s", "0s", "4s"]),
    }
)


@settings(max_examples=12, phases=(Phase.explicit, Phase.reuse, Phase.generate), deadline=None)
@given(changes=VARIANTS)
def test_invariants_of_any_run(changes):
    fixed = {"workload.requests": 24, "workload.concurrency": 6, "targets.inner_link": "inner", "churn.down": "1s"}
    scenario = changed(parse_scenario(SCENARIO, "test.toml"), {**fixed, **changes})
    runs = [Fleet(scenario, policy_maker(scenario.speculation), is_recording=True).run() for _ in range(2)]
    run = runs[0]
    assert len(run.logs) == 24
    assert run.num_leaked == run.num_unfinished == 0
    source = random.Random(f"{scenario.seed} arrivals")
    asked = sorted(each.num_answer_tokens for each in arrivals(scenario.workload, source))
    written = sorted(sum(size for _, size in log.arrivals) for log in run.logs if not log.error)
    assert written == asked or (scenario.churn.up and len(written) < 24)
    for log in run.logs:
        times = [log.arrived_s, *(at_s for at_s, _ in log.arrivals or ())]
        assert all(before <= after + 1e-9 for before, after in itertools.pairwise(times))
    by_stage = {}
    for target, stage, start_s, end_s, num_windows, _ in run.passes:
        assert num_windows <= scenario.targets[0].max_batch
        by_stage.setdefault((target, stage), []).append((start_s, end_s))
    for passes in by_stage.values():
        # One pass at a time.
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(passes))
    report = summarise(run)
    assert report.littles_law == pytest.approx(1, rel=0.02)
    first, second = (msgspec.json.encode([summarise(each), rows(each)]) for each in runs)
    assert first == second, "the same seed gives the same bytes"
    json.loads(chrome_trace(run))


def test_tokens_out_are_tokens_asked():
    scenario = parse_scenario(SCENARIO, "test.toml")
    lengths = random.Random(f"{scenario.seed} arrivals")
    run = simulate()
    wanted = [each.num_answer_tokens for each in arrivals(scenario.workload, lengths)]
    assert [log.num_tokens for log in sorted(run.logs, key=lambda log: log.number)] == wanted


def test_acceptance_is_of_drafts_and_not_of_prompts():
    def report(**changes):
        return summarise(simulate(workload__prompt__mean=600, **changes))

    assert report(acceptance__rate=1.0).acceptance > 0.9
    assert 0.4 < report(acceptance__rate=0.8).acceptance < 0.75, "of four, two or three"
    assert report(speculation__policy="plain").acceptance != report(speculation__policy="plain").acceptance, "no drafts"


def test_nothing_happens_in_the_past():
    clock, seen = Clock(), []
    clock.after(1.0, seen.append, "later")
    clock.after(0.0, seen.append, "now")
    with pytest.raises(ValueError, match="expected 0 or more"):
        clock.after(-1e-9, seen.append, "before")
    with pytest.raises(ValueError, match="expected 0 or more"):
        clock.after(float("nan"), seen.append, "never")
    clock.run(10)
    assert seen == ["now", "later"]


def test_shared_cores_divide_their_time():
    """Three jobs of a second on two cores: each gets two thirds of one, the shorter ones are done first."""
    clock, done = Clock(), {}
    cores = SharedCores(clock, 2)
    for name, seconds in (("short", 0.5), ("long", 1.0), ("other", 1.0)):
        cores.user().run(seconds, lambda name=name: done.setdefault(name, clock.now_s))
    clock.run(10)
    assert done["short"] == pytest.approx(0.75)
    # Then two cores for two jobs, which had half a second of theirs.
    assert done["long"] == done["other"] == pytest.approx(1.25)


def test_a_heavy_job_takes_a_core_of_its_own():
    clock, done = Clock(), {}
    cores = SharedCores(clock, 2)
    for name, weight in (("drafter", 4), ("stage", 1), ("other", 1)):
        cores.user(weight).run(1.0, lambda name=name: done.setdefault(name, clock.now_s))
    clock.run(10)
    assert done["drafter"] == pytest.approx(1.0)
    # Half a core each for a second, then one each.
    assert done["stage"] == done["other"] == pytest.approx(1.5)


# What changes what


def test_attention_takes_longer_the_longer_the_text():
    text = SCENARIO.replace('per_node = "0.1ms" }', 'per_node = "0.1ms", per_context = "20us" }')

    def tpot(text, prompt):
        changes = {"speculation__policy": "plain", "workload__prompt": {"mean": prompt}, "workload__requests": 4}
        return summarise(simulate(text, workload__rate=0.1, **changes)).tpot_s.mean

    # One at a time, 30 tokens: 20 us for each of the positions behind, half of the answer's among them in the mean.
    assert tpot(SCENARIO, 1000) == pytest.approx(tpot(SCENARIO, 10))
    assert tpot(text, 1000) - tpot(text, 10) == pytest.approx(990 * 20e-6, rel=0.01)


def test_fused_decoding_does_not_mind_the_distance_and_distributed_does():
    def tpot(mode, latency):
        return summarise(simulate(speculation__mode=mode, links__edge__latency=latency)).tpot_s.mean

    assert tpot("fused", "100ms") == pytest.approx(tpot("fused", "2ms"), rel=0.05)
    assert tpot("distributed", "2ms") < 0.8 * tpot("fused", "2ms")
    assert tpot("distributed", "100ms") > tpot("fused", "100ms")


class _Script:
    """Decides what it is told, in order, and the last of it from then on."""

    def __init__(self, decisions):
        self._decisions = list(decisions)

    def decide(self, observation):
        self.seen = observation
        return self._decisions.pop(0) if len(self._decisions) > 1 else self._decisions[0]


@pytest.mark.parametrize(
    ("decisions", "switches"),
    [
        ([PLAIN, sync_chain(4)], 0),
        ([PLAIN, PLAIN, sync_chain(4), PLAIN, sync_chain(4)], 0),
        ([PLAIN, PLAIN, PLAIN, PLAIN], 1),
        ([sync_chain(4), PLAIN, PLAIN, sync_chain(4), sync_chain(4), PLAIN], 3),
    ],
)
def test_a_request_moves_to_its_target_after_two_decisions_not_to_speculate(decisions, switches):
    """And what it measures there is what it would be where the drafter is."""
    scripts = []

    def policy():
        scripts.append(_Script(decisions))
        return scripts[-1]

    changes = {
        "speculation.mode": "auto",
        "links.edge.latency": "40ms",
        "links.edge.jitter": 0,
        "workload.requests": 1,
        "drafters.count": 1,
        "targets.count": 1,
    }
    scenario = changed(parse_scenario(SCENARIO, "test"), changes)
    (log,) = Fleet(scenario, policy).run().logs
    assert log.num_switches == switches
    # The first window after a move has the way of the move in it.
    assert scripts[0].seen.links_s == pytest.approx(0.08, rel=0.05 if switches < 2 else 0.06)


def test_sharded_targets_pay_for_their_own_links_either_way():
    """Fused saves the two outer links only: speculation wins at any distance between the stages."""

    def tpot(mode):
        shared = {"targets__stages": 4, "targets__inner_link": "inner", "links__inner__latency": "60ms"}
        return summarise(simulate(speculation__mode=mode, links__edge__latency="60ms", **shared)).tpot_s.mean

    assert tpot("distributed") < 0.7 * tpot("fused")


def test_the_shortest_queue_beats_a_random_one():
    def waiting(routing):
        return summarise(
            simulate(
                speculation__routing=routing,
                workload__rate=16,
                targets__count=4,
                targets__max_batch=1,
                workload__requests=300,
            )
        ).total_s.p95

    assert waiting("jsq") < 0.9 * waiting("random")


def test_targets_fail_and_the_text_goes_on_elsewhere():
    run = simulate(churn__up="3s", churn__down="1s", churn__notice="100ms", workload__requests=200)
    done = [log for log in run.logs if not log.error]
    assert sum(log.counts["num_replays"] for log in run.logs) > 5
    assert len(done) > 150
    assert run.num_leaked == 0
    assert all("down" in log.error or "no target" in log.error for log in run.logs if log.error)


def test_loss_and_stalls_cost_time():
    rng = random.Random(0)
    plain, lossy = LinkModel(latency_s=0.01), LinkModel(latency_s=0.01, loss=0.2)
    stalling = LinkModel(latency_s=0.01, stall_every_s=1.0, stall_s=0.5)

    def delays(model):
        link = LinkState(model)
        return [link.send(now_s=at, num_bytes=100, rng=rng) - at for at in range(400)]

    assert set(map(round, [1e6 * delay for delay in delays(plain)])) == {10_000}
    late = [delay for delay in delays(lossy) if delay > 0.1]
    assert 40 < len(late) < 140
    assert 0.15 < sum(delay > 0.011 for delay in delays(stalling)) / 400 < 0.5


def test_a_parametric_drafter_is_as_good_as_it_says():
    for rate in (0.3, 0.7, 0.9, 0.98):
        answer = ParametricAnswer(AgreementModel(rate=rate, num_candidates=1), seed=5)
        hits = []
        for position in range(4000):
            (first, *_rest) = answer._children(position, is_on_path=True, salt=0, width=16)
            hits.append(first.token == answer.pick(position))
        assert sum(hits) / len(hits) == pytest.approx(rate, abs=0.03)


def test_a_sweep_is_the_same_on_one_core_and_on_two():
    class Silent:
        def step(self, what, done, total):
            pass

    scenario = changed(parse_scenario(SCENARIO, "test.toml"), {"workload.requests": 20})
    points = grid(["speculation.depth=2,6", "links.edge.latency=1ms,20ms"])
    assert len(points) == 4
    results = [sweep(scenario, points, 2, Silent(), num_processes=count) for count in (1, 2)]
    first, second = ([cell.reports for cell in cells] for cells in results)
    assert msgspec.json.encode(first) == msgspec.json.encode(second)
    assert len({report.tpot_s.mean for reports in first for report in reports}) == 8


# Scenario files


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("rate = 8", "rate = -8", 18, r"workload\.rate: Expected `float` > 0"),
        ('latency = "5ms"', 'latency = "5 parsecs"', 4, r"latency: '5 parsecs': expected a number"),
        ("max_batch = 8", "max_batch = 0", 14, r"targets\[0\]\.max_batch: Expected `int` >= 1"),
        ("max_batch = 8", "max_batches = 8", 14, r"targets\[0\]\.max_batches: Object contains unknown field"),
        ('latency = "5ms"', 'latencyy = "5ms"', 4, r"links\[\.\.\.\]\.latencyy: Object contains unknown field"),
        (
            'link = "edge"',
            'link = "moon"',
            9,
            r"drafters\[0\]\.link: is 'moon', expected one of the \[links\]: edge, inner",
        ),
        ("seed = 3", "seed = [3", None, r"at line 3"),
        ("rate = 0.8", "rate = 1.5", 22, r"acceptance\.rate: Expected `float` <= 1"),
        ("requests = 120", 'requests = 120\narrivals = "trace"', 18, r'"trace" needs workload\.file'),
    ],
)
def test_a_bad_scenario_names_file_line_field_and_limit(old, new, where, what, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(SCENARIO.replace(old, new, 1))
    with pytest.raises(ConfigError, match=what) as caught:
        parse_scenario(file.read_text(), str(file))
    assert str(caught.value).startswith(f"{file}:" if where is None else f"{file}:{where}:")


def test_a_change_that_does_not_exist_is_named():
    scenario = parse_scenario(SCENARIO, "test.toml")
    with pytest.raises(ConfigError, match=r"no field links\.moon\.latency"):
        changed(scenario, {"links.moon.latency": "1ms"})
    with pytest.raises(ConfigError, match="unknown field `speed`"):
        changed(scenario, {"workload.speed": 1})
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        grid(["speculation.depth"])


def test_every_scenario_of_the_docs_is_read():
    files = sorted(Path("docs/scenarios").glob("*.toml"))
    assert files
    for file in files:
        parse_scenario(file.read_text(), str(file))


def test_a_simulated_run_tells_what_a_live_one_does():
    events = []
    scenario = changed(parse_scenario(SCENARIO, "test.toml"), {"workload.requests": 40})
    told = Fleet(scenario, policy_maker(scenario.speculation), tell=events.append).run()
    untold = Fleet(scenario, policy_maker(scenario.speculation)).run()
    assert [log.finished_s for log in told.logs] == [log.finished_s for log in untold.logs]
    picture = Picture()
    for event in events:
        picture.add(decode_event(encode_event(event)))
    picture.tick(told.duration_s)
    assert picture.totals["sessions"] == picture.totals["ended"] == 40
    assert picture.totals["num_tokens"] == sum(log.num_tokens for log in told.logs)
    assert {peer.split("/")[0] for peer in picture.peers} == {"target-0", "target-1"}
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
