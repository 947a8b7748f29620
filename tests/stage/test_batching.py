"""Many sessions at one stage: together in a pass, each as if alone, in turn, and gone without a trace."""

import random
import threading

import pytest
import reference
import trio
from families import NUM_LAYERS
from prompting import prompt_of
from swarms import load_stages, model_swarm
from toy import plain_text
from toy_drafts import TREE
from toy_model import ToySpanModel
from toy_swarm import NUM_STAGES, SPANS, toy_swarm

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import ModelError
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.peers.scopes import Scopes
from dsd_p2p.stage.admission import StageLimits
from dsd_p2p.stage.batcher import Batcher
from dsd_p2p.types import Sampling, Span, TextRequest
from dsd_p2p.window.static import PLAIN, StaticPolicy, sync_chain
from dsd_p2p.window.tracker import Tracker

LIMITS = StageLimits(sessions=Scopes(what="sessions", node=64, root=64, peer=64))


class Gate:
    """Holds passes up while it is closed."""

    def __init__(self) -> None:
        self._may_pass = threading.Event()
        self._may_pass.set()

    def close(self) -> None:
        self._may_pass.clear()

    def open(self) -> None:
        self._may_pass.set()

    def __call__(self) -> None:
        self._may_pass.wait(30)


@pytest.mark.parametrize("decision", [PLAIN, sync_chain(4), TREE], ids=["plain", "sync", "tree"])
async def test_sixteen_sessions_share_passes_and_write_what_each_writes_alone(decision):
    models = [ToySpanModel(span, NUM_STAGES) for span in SPANS]
    prompts = [[seed % 7, *range(1, 2 + seed % 5)] for seed in range(16)]
    texts: dict[int, list[int]] = {}
    gate = Gate()
    models[0].before_pass = gate
    async with toy_swarm(stages=models, limits=LIMITS) as swarm:

        async def write(index: int) -> None:
            texts[index], _ = await swarm.write(prompts[index], 30, decision)

        gate.close()
        async with trio.open_nursery() as nursery:
            for index in range(16):
                nursery.start_soon(write, index)
            await trio.sleep(0.2)
            gate.open()
        await swarm.all_closed()
    assert texts == {index: plain_text(prompt, 30) for index, prompt in enumerate(prompts)}
    # Whoever waits when a pass begins is in it.
    assert max(models[0].batches[:2]) >= 15
    assert max(models[2].batches) > 1
    assert all(model.num_caches == 0 for model in models)


async def test_verdicts_tell_how_long_their_windows_waited(monkeypatch):
    models = [ToySpanModel(span, NUM_STAGES) for span in SPANS]
    gate = Gate()
    models[0].before_pass = gate
    waited: list[float] = []
    take_in = Tracker.verdict

    def verdict(tracker, *, traversal_s, costs, waited_s):
        waited.append(waited_s)
        take_in(tracker, traversal_s=traversal_s, costs=costs, waited_s=waited_s)

    monkeypatch.setattr(Tracker, "verdict", verdict)
    async with toy_swarm(stages=models, limits=LIMITS) as swarm:
        gate.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.write, [1, 2, 3], 4, PLAIN)
            await trio.sleep(0.2)
            # The first one's pass is under way.
            nursery.start_soon(swarm.write, [4, 5, 6], 4, PLAIN)
            await trio.sleep(0.4)
            gate.open()
    # The two roots, behind the pass over the tokens given with the first.
    assert sum(waited_s >= 0.3 for waited_s in waited) == 2


async def test_a_long_prompt_holds_nobody_up_for_longer_than_a_piece_of_it():
    models = [ToySpanModel(span, NUM_STAGES) for span in SPANS]
    rows: list[list[int]] = []
    run = models[0].run
    models[0].run = lambda passes: (rows.append([each.num_rows for each in passes]), run(passes))[1]
    async with toy_swarm(stages=models, limits=LIMITS) as swarm:
        texts: dict[str, list[int]] = {}

        async def write(name: str, prompt: list[int]) -> None:
            texts[name], _ = await swarm.write(prompt, 20, PLAIN)

        gate = Gate()
        models[0].before_pass = gate
        gate.close()
        short, long = [1, 2, 3], [seed % 7 for seed in range(500)]
        async with trio.open_nursery() as writers:
            writers.start_soon(write, "short", short)
            writers.start_soon(write, "long", long)
            await trio.sleep(0.2)
            gate.open()
        assert texts == {"short": plain_text(short, 20), "long": plain_text(long, 20)}
    shared = [each for each in rows if len(each) > 1]
    assert shared, rows
    assert all(max(each) <= 32 for each in shared)
    # Alone it is not cut finer than it was sent.
    assert max(max(each) for each in rows) == 128


async def test_a_coordinator_with_many_sessions_gets_as_much_as_one_with_few():
    class Work:
        is_stale, model, is_begun = False, "model", True

        def __init__(self, owner: str) -> None:
            self.owner, self.num_left = owner, 32

    batcher = Batcher(trio.Lock(), lambda: 0.0, lambda *_: None)
    served = {"greedy": 0, "modest": 0}
    async with trio.open_nursery() as nursery:
        for peer, count in (("greedy", 20), ("modest", 6)):
            for _ in range(count):
                nursery.start_soon(batcher.run, Work(peer))
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(60):
            for entry, num_rows in batcher._choose():
                served[entry.work.owner] += num_rows
                batcher._end(entry)
                # Whoever was served comes at once with the next window.
                nursery.start_soon(batcher.run, Work(entry.work.owner))
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert 0.9 < served["greedy"] / served["modest"] < 1.1
    assert sum(served.values()) == 60 * 128
    assert batcher.num_waiting == 0


async def test_a_single_row_is_soon_served_beside_many_long_prompts():
    class Work:
        is_stale, model, is_begun = False, "model", True

        def __init__(self, peer: str, num_rows: int) -> None:
            self.owner, self.num_left = peer, num_rows

    batcher = Batcher(trio.Lock(), lambda: 0.0, lambda *_: None)
    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(batcher.run, Work(f"long{number}", 128))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            _serve(batcher)
        nursery.start_soon(batcher.run, Work("short", 1))
        await trio.testing.wait_all_tasks_blocked()
        passes = 1
        while not any(work.owner == "short" for work in _serve(batcher)):
            passes += 1
        assert passes <= 5
        nursery.cancel_scope.cancel()


def _serve(batcher: Batcher) -> list:
    """One pass without a model; returns what was in it."""
    batch = batcher._choose()
    for entry, num_rows in batch:
        entry.work.num_left -= num_rows
    batcher._settle(batch)
    return [entry.work for entry, _ in batch]


async def test_a_pass_that_fails_as_a_whole_fails_only_who_is_to_blame():
    models = [ToySpanModel(span, NUM_STAGES) for span in SPANS]
    run = models[0].run

    def fragile(passes):
        if any(each.num_rows > 15 for each in passes):
            raise RuntimeError("out of memory")
        return run(passes)

    models[0].run = fragile
    texts, errors = {}, []
    async with toy_swarm(stages=models, limits=LIMITS) as swarm, trio.open_nursery() as nursery:

        async def write(name: int, prompt: list[int]) -> None:
            try:
                texts[name], _ = await swarm.write(prompt, 12, PLAIN)
            except ModelError as exc:
                errors.append(str(exc))

        for number in range(6):
            nursery.start_soon(write, number, [number, 1, *range(6)])
        nursery.start_soon(write, 99, [3] * 20)
    assert len(errors) == 1
    assert texts == {number: plain_text([number, 1, *range(6)], 12) for number in range(6)}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_real_layers_write_for_sixteen_what_they_write_for_one(tiny, temperature):
    folder = tiny("llama")
    source = find_model(str(folder), NoProgress())
    drafter = ModelDrafter(open_span(source, Span(0, NUM_LAYERS)), "itself")
    prompts = [prompt_of(3 + 5 * index, seed=index) for index in range(16)]
    decisions = [PLAIN, sync_chain(3), TREE]
    texts: dict[int, list[int]] = {}
    async with model_swarm(load_stages(source, 2), drafter, limits=LIMITS) as swarm:

        async def write(index: int) -> None:
            sampling = Sampling(temperature=temperature, seed=index)
            options = GenerateOptions(text=TextRequest(max_tokens=24, sampling=sampling))
            policy = StaticPolicy(decisions[index % 3])
            async with swarm.engine.generate(prompts[index], options, policy) as generation:
                texts[index] = [token async for token in generation]

        async with trio.open_nursery() as nursery:
            for index in range(16):
                nursery.start_soon(write, index)
        together, texts = texts, {}
        for index in range(16):
            await write(index)
    assert together == texts
    if temperature == 0:
        assert texts == {index: reference.greedy(folder, prompt, 24) for index, prompt in enumerate(prompts)}


async def test_nothing_is_left_of_five_hundred_sessions_with_random_cancels():
    models = [ToySpanModel(span, NUM_STAGES) for span in SPANS]
    rng = random.Random(5)
    num_whole = 0
    async with toy_swarm(stages=models, limits=LIMITS, accuracy=0.7) as swarm:

        async def write(index: int, leave_after: int) -> None:
            nonlocal num_whole
            prompt = [index % 7, 1, 2]
            options = GenerateOptions(text=TextRequest(max_tokens=12))
            async with swarm.engine.generate(prompt, options, StaticPolicy(TREE)) as generation:
                tokens = []
                async for token in generation:
                    tokens.append(token)
                    if len(tokens) > leave_after:
                        break
                assert tokens == plain_text(prompt, 12)[: len(tokens)]
                num_whole += len(tokens) == 12

        limiter = trio.Semaphore(16)

        async def limited(index: int) -> None:
            async with limiter:
                await write(index, rng.randrange(0, 24))

        async with trio.open_nursery() as nursery:
            for index in range(500):
                nursery.start_soon(limited, index)
        await swarm.all_closed()
        assert swarm.engine._drivers == {}
        assert all(server.work.num_waiting == 0 for server in swarm.servers)
    assert 100 < num_whole < 400
    assert all(model.num_caches == 0 for model in models)
    assert models[0].num_opened == 500
