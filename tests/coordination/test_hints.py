"""Hints: what a drafter did for another coordinator is begun with, and neither a wrong nor a missing one does harm."""

from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from dsd_p2p.coordination.hints import _MAX_ANSWERING, SharedExperience, _hits_of
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.peers.services import run_services
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import PeerInfo
from dsd_p2p.window.tracker import Calibration, Tracker
from dsd_p2p.wire.codec import decode, encode
from dsd_p2p.wire.hints import AskHint, Hint, Hits

NAME = ("learned", "shadow+ngram", "model", "stage [0, 3)")


@asynccontextmanager
async def members(tmp_path, *names):
    """Connected members that share experience; each asks all others."""
    network = MemoryNetwork()
    found = []
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for name in names:
            transport = await stack.enter_async_context(network.open(name))
            links = PeerLinks(transport, PeerInfo(peer=name, addresses=(f"memory:{name}",)))
            others = [other for other in names if other != name]
            experience = SharedExperience(tmp_path / name, links, lambda others=others: others)
            found.append((experience, links))
            nursery.start_soon(run_services, links, [experience])
        for name in names[1:]:
            await found[0][1].connect(f"memory:{name}", 5)
        yield [*(experience for experience, _ in found), nursery]
        nursery.cancel_scope.cancel()


def rate(tracker):
    return tracker.observe().hit_rate_by_rank[0]


async def test_a_coordinator_begins_with_what_another_measured(tmp_path, autojump_clock):
    async with members(tmp_path, "new", "old") as (new, old, nursery):
        old.keep(NAME, kept())
        tracker = Tracker()
        new.begin(NAME, tracker, nursery)
        await trio.sleep(1)
        assert rate(tracker) > rate(Tracker())
        # Nobody knows another route, and nobody is asked about one that is in the file.
        stranger = Tracker()
        new.begin(("learned", "ngram", "model", "elsewhere"), stranger, nursery)
        await trio.sleep(5)
        assert stranger.observe() == Tracker().observe()
        new.keep(NAME, kept())
        begun = Tracker()
        new.begin(NAME, begun, nursery)
        assert begun.observe().num_outcomes > 0
        assert not new._waiting


async def test_answers_that_nobody_asked_for_change_nothing(tmp_path, autojump_clock):
    async with members(tmp_path, "new", "old", "liar") as (new, old, liar, nursery):
        tracker = Tracker()
        bad = Hits(confidence=0, exponent=500, hits=(0,), tries=(10_000,))
        for number in range(5):
            await liar._links.send("new", Hint(number=number, known=bad))
        new.begin(NAME, tracker, nursery)
        await trio.sleep(0.5)
        # Each question is answered once, by the peer that was asked.
        for number in range(5):
            await liar._links.send("new", Hint(number=number, known=bad))
        await trio.sleep(5)
        for number in range(5):
            await old._links.send("new", Hint(number=number, known=bad))
        await trio.sleep(1)
        assert tracker.observe() == Tracker().observe()


async def test_members_that_are_gone_cost_nothing(tmp_path, autojump_clock):
    async with members(tmp_path, "new") as (new, nursery):
        new._peers = lambda: ["nobody"]
        tracker = Tracker()
        new.begin(NAME, tracker, nursery)
        new.begin(("x" * 20_000,), tracker, nursery)
        await trio.sleep(5)
        assert tracker.observe() == Tracker().observe()
        assert not new._waiting


def kept(**changes):
    tracker = Tracker()
    for _ in range(30):
        tracker.outcome(0, [-0.1])
    return msgspec.structs.replace(tracker.kept(), **changes)


def test_a_hint_says_what_was_measured_and_fits_the_wire():
    found = _hits_of(kept())
    frame = encode(Hint(number=3, known=found))
    message, _ = decode(frame)
    assert message.known == found
    assert found.hits[0] == found.tries[0] > 100


@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.lists(st.floats(allow_nan=False), max_size=80))
def test_whatever_a_file_held_fits_the_wire(confidence, exponent, numbers):
    """A file may have been changed by hand."""
    hits = _hits_of(
        kept(confidence=confidence, exponent=exponent, hits_by_rank=tuple(numbers), tries_by_rank=tuple(numbers))
    )
    decode(encode(Hint(number=0, known=hits)))


def test_a_tracker_begins_with_a_hint_until_it_has_tried_itself():
    good = Calibration(confidence=0.95, exponent=1.0, hits=[90.0], tries=[100.0])
    bad = Calibration(confidence=0.1, exponent=1.0, hits=[5.0], tries=[100.0])
    fresh = Tracker()
    hopeful, wary = Tracker(), Tracker()
    hopeful.calibrate(good)
    wary.calibrate(bad)
    assert rate(wary) < rate(fresh) < rate(hopeful)
    for _ in range(40):
        wary.outcome(0, [-0.1])
        fresh.outcome(0, [-0.1])
    assert rate(wary) > 0.7, "own measurements outweigh a hint"
    before = rate(fresh)
    fresh.calibrate(bad)
    assert rate(fresh) == before, "a hint comes too late"


def test_more_hits_than_tries_are_not_taken():
    tracker, fresh = Tracker(), Tracker()
    tracker.calibrate(Calibration(confidence=0.7, exponent=1.3, hits=[100.0], tries=[1.0]))
    assert tracker.observe().hit_rate_by_rank == fresh.observe().hit_rate_by_rank


def test_however_much_a_hint_claims_it_is_soon_outweighed_and_not_passed_on():
    lied_to, fresh = Tracker(), Tracker()
    lied_to.calibrate(Calibration(confidence=0.7, exponent=1.3, hits=[0.0] * 3, tries=[100_000.0] * 3))
    for _ in range(60):
        lied_to.outcome(0, [-0.1])
        fresh.outcome(0, [-0.1])
    assert rate(lied_to) > 0.7
    ours, honest = lied_to.kept(), fresh.kept()
    assert ours.hits_by_rank == pytest.approx(honest.hits_by_rank)
    assert ours.tries_by_rank == pytest.approx(honest.tries_by_rank)


async def test_a_member_that_does_not_read_holds_up_nobody(tmp_path, autojump_clock):
    async with members(tmp_path, "mute", "busy", "other") as (mute, busy, other, nursery):
        send = busy._links.send

        async def stuck(to, message, payload=b""):
            if to == "mute":
                await trio.sleep_forever()
            await send(to, message, payload)

        busy._links.send = stuck
        busy.keep(NAME, kept())
        for number in range(100):
            await mute._links.send("busy", AskHint(number=number, name="\n".join(NAME)))
        await trio.sleep(0.1)
        assert busy._num_answering == _MAX_ANSWERING
        await trio.sleep(2)
        assert busy._num_answering == 0
        await other._links.connect("memory:busy", 5)
        tracker = Tracker()
        other._peers = lambda: ["busy"]
        other.begin(NAME, tracker, nursery)
        await trio.sleep(1)
        assert rate(tracker) > rate(Tracker())
