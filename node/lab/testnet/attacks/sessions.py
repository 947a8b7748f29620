"""Attacks on sessions and on what they take, by a member with a client's invite."""

import os
from contextlib import AsyncExitStack

import msgspec
import trio

from dsd_p2p.types import Constraint, ConstraintKind, Endpoint, Span, TextRequest
from dsd_p2p.wire.messages import (
    AnswerEnd,
    Ask,
    Cancel,
    CloseSession,
    FailureKind,
    Hello,
    Hop,
    Ping,
    Recompute,
    Recomputed,
    Reveal,
    Verdict,
)
from dsd_p2p.wire.version import PROTOCOL_VERSION
from node.lab.testnet.attacks.ground import Enemy, Ground, NotHeld, enemy, window
from node.member.control import PeerReport, Status, ask_node
from node.member.state import SwarmState

_TEXT = TextRequest(max_tokens=8)


async def _open(attacker: Enemy, **changes: object) -> bytes:
    session = os.urandom(8)
    await attacker.say(attacker.opening(session, **changes))
    return session


async def _report(ground: Ground) -> PeerReport:
    report = await ask_node(SwarmState(ground.owner).control_socket, Status(), 20)
    assert isinstance(report, PeerReport)
    return report


async def open_in_anothers_name(ground: Ground) -> None:
    """Open a session as if the second stage had asked for it."""
    async with enemy(ground) as attacker:
        await _open(attacker, coordinator=Endpoint(ground.stages[-1][0]))
        await attacker.must_be_dropped("it opened a session in another's name")


async def open_without_a_signature(ground: Ground) -> None:
    """Open a session with a signature of something else."""
    async with enemy(ground) as attacker:
        opened = msgspec.structs.replace(attacker.opening(os.urandom(8)), signature=bytes(64))
        await attacker.say(opened)
        await attacker.must_be_dropped("its opening was not signed")


async def open_a_changed_opening(ground: Ground) -> None:
    """Change an opening after it was signed."""
    async with enemy(ground) as attacker:
        await attacker.say(msgspec.structs.replace(attacker.opening(os.urandom(8)), num_given=1, num_prompt=1))
        await attacker.must_be_dropped("its opening was changed")


async def take_over_a_session(ground: Ground) -> None:
    """Open a session anew that another client has open."""
    async with enemy(ground) as victim, enemy(ground) as attacker:
        session = await _open(victim)
        await trio.sleep(0.5)
        await attacker.say(attacker.opening(session, epoch=1))
        await attacker.must_be_refused(FailureKind.PROTOCOL, why="it took another's session")
        if victim.is_lost or victim.failures():
            raise NotHeld("the victim's session ended")


async def windows_for_anothers_session(ground: Ground) -> None:
    """Send windows, a cancel and a close for another client's session."""
    for words in (window, _cancel, _close, _reveal):
        async with enemy(ground) as victim, enemy(ground) as attacker:
            session = await _open(victim)
            await trio.sleep(0.5)
            await attacker.say(words(session))
            await trio.sleep(0.5)
            await victim.say(window(session))
            if not await victim.hears(Verdict, 20):
                raise NotHeld(f"{words.__name__.strip('_')} stopped another's session")
            await victim.say(_close(session))


def _cancel(session: bytes) -> Cancel:
    return Cancel(session=session, epoch=9)


def _close(session: bytes) -> CloseSession:
    return CloseSession(session=session, epoch=9)


def _reveal(session: bytes) -> Reveal:
    return Reveal(session=session, start=0, end=2, at=(0, 1))


async def rows_of_an_unaudited_session(ground: Ground) -> None:
    """Ask for the rows of a session that is not audited."""
    async with enemy(ground) as attacker:
        session = await _open(attacker)
        await trio.sleep(0.5)
        await attacker.say(_reveal(session))
        await attacker.must_be_dropped("it asked for rows that nobody signed")


async def the_same_rows_again(ground: Ground) -> None:
    """Ask a thousand times for the same rows."""
    async with enemy(ground) as attacker:
        session = await _open(attacker, attest=True)
        await attacker.say(window(session))
        await trio.sleep(1)
        for _ in range(1000):
            await attacker.say(_reveal(session))
        await attacker.must_be_dropped("it asked for the same rows a thousand times", 20)


async def rows_beyond_a_piece(ground: Ground) -> None:
    """Ask for four thousand rows at once."""
    async with enemy(ground) as attacker:
        session = await _open(attacker, attest=True)
        await trio.sleep(0.5)
        await attacker.say(Reveal(session=session, start=0, end=4096, at=(0, 1)))
        await attacker.must_be_dropped("it asked for more than a piece")


async def many_checks(ground: Ground) -> None:
    """Ask for thirty checks at once."""
    async with enemy(ground) as attacker:
        span = ground.stages[0][2]
        if span.first:
            raise NotHeld("the target holds no head, which this attack needs")
        for _ in range(30):
            tokens = tuple(range(5, 405))
            asked = Recompute(
                request=os.urandom(8), span=span, model=ground.model, tokens=tokens, text=_TEXT, num_prompt=400
            )
            await attacker.say(asked)
        async with enemy(ground) as honest:
            if not await honest.answers_ping(5):
                raise NotHeld("checks kept the target from answering others")
        await attacker.until(lambda: len(_recomputed(attacker)) > 5, 30)
        done = [each for each in _recomputed(attacker) if not each.error]
        if len(done) > 5:
            raise NotHeld(f"{len(done)} checks were computed at once")


def _recomputed(attacker: Enemy) -> list[Recomputed]:
    return [each for each in attacker.heard if isinstance(each, Recomputed)]


async def check_of_another_size(ground: Ground) -> None:
    """Ask for a check with too few hidden states."""
    async with enemy(ground) as attacker:
        asked = Recompute(
            request=os.urandom(8), span=Span(1, 2), model=ground.model, tokens=(1, 2), text=_TEXT, num_prompt=2
        )
        await attacker.say(asked, bytes(3))
        answer = await attacker.must_hear(Recomputed, "a wrong check was not answered")
        if isinstance(answer, Recomputed) and not answer.error:
            raise NotHeld("a check with too few rows was computed")


async def verdict_from_a_client(ground: Ground) -> None:
    """Send the target a verdict."""
    async with enemy(ground) as attacker:
        verdict = Verdict(session=os.urandom(8), epoch=0, window=0, start_pos=2, tokens=(5,), settled=(-1,))
        for _ in range(20):
            await attacker.say(verdict)
        if not await attacker.is_dropped(2) and not await attacker.answers_ping():
            raise NotHeld("the target stopped at a verdict")


async def too_many_sessions(ground: Ground) -> None:
    """Open forty sessions."""
    async with enemy(ground) as attacker:
        for _ in range(40):
            await _open(attacker, text=TextRequest(max_tokens=1))
        await attacker.must_be_refused(FailureKind.CAPACITY, why="forty sessions of one client")
        if (await _report(ground)).num_sessions > 16 + 4:
            raise NotHeld("one client holds more sessions than it may")


async def many_keys_of_one_invite(ground: Ground) -> None:
    """Open sixty sessions with five keys of one invite."""
    invite, opened = ground.invite(uses=6), 0
    async with AsyncExitStack() as stack:
        for _ in range(5):
            attacker = await stack.enter_async_context(enemy(ground, invite))
            for _ in range(12):
                await _open(attacker, text=TextRequest(max_tokens=1))
            await trio.sleep(2)
            opened += 12 - sum(each.kind is FailureKind.CAPACITY for each in attacker.failures())
    if opened > 32:
        raise NotHeld(f"keys of one invite hold {opened} sessions")


async def the_whole_cache(ground: Ground) -> None:
    """Reserve the whole cache with sessions that send nothing."""
    async with enemy(ground) as attacker:
        for _ in range(16):
            await _open(attacker, text=TextRequest(max_tokens=ground.max_positions - 2))
        await trio.sleep(1)
        async with enemy(ground) as honest:
            session = await _open(honest)
            await honest.say(window(session))
            if not await honest.hears(Verdict, 20):
                raise NotHeld("idle sessions left no room for others")


async def session_without_windows(ground: Ground) -> None:
    """Open a session and send nothing: its cache must be free soon."""
    async with enemy(ground) as attacker:
        await _open(attacker, idle_timeout_s=3600.0)
        if not await attacker.until(lambda: bool(attacker.failures()) or attacker.is_lost, 45):
            raise NotHeld("a session without a window was still open after 45 s")


async def windows_that_break_rules(ground: Ground) -> None:
    """Send windows whose epochs, parents, roots and positions cannot be."""
    for changes in (
        {"epoch": 7},
        {"parents": (5, 6)},
        {"positions": (3, 4)},
        {"root": (0, 900)},
        {"first_node": 77},
    ):
        async with enemy(ground) as attacker:
            session = await _open(attacker)
            await trio.sleep(0.3)
            await attacker.say(window(session, **changes))
            await attacker.must_be_refused(FailureKind.PROTOCOL, FailureKind.CAPACITY, why=f"a window with {changes}")


async def tokens_outside_the_vocabulary(ground: Ground) -> None:
    """Send tokens that no vocabulary has."""
    async with enemy(ground) as attacker:
        session = await _open(attacker)
        await trio.sleep(0.3)
        await attacker.say(window(session, tokens=(2_000_000_000, 1)))
        await attacker.must_be_refused(FailureKind.PROTOCOL, FailureKind.MODEL, why="a token outside the vocabulary")
        if any("2000000000" in each.text for each in attacker.failures()):
            raise NotHeld("an error tells the token")


async def a_route_with_a_gap(ground: Ground) -> None:
    """Open a session over a route that leaves layers out."""
    async with enemy(ground) as attacker:
        first = ground.route[0]
        await _open(attacker, route=(Hop(peer=first.peer, address=first.address, span=Span(0, 1)),))
        await attacker.must_be_refused(FailureKind.PROTOCOL, why="its route leaves layers out")


async def another_model(ground: Ground) -> None:
    """Ask for another model."""
    async with enemy(ground) as attacker:
        await _open(attacker, model=msgspec.structs.replace(ground.model, digest="other"))
        await attacker.must_be_refused(FailureKind.MODEL, FailureKind.PROTOCOL, why="another model")


async def a_schema_that_explodes(ground: Ground) -> None:
    """Constrain a text by a schema that takes gigabytes to compile."""
    async with enemy(ground) as attacker:
        bomb = "(" * 40 + "a" + "{0,900})" * 40
        constraint = Constraint(kind=ConstraintKind.REGEX, source=bomb)
        await _open(attacker, text=TextRequest(max_tokens=4, constraint=constraint))
        await trio.sleep(3)
        async with enemy(ground) as honest:
            if not await honest.answers_ping(5):
                raise NotHeld("a schema kept the target from answering others")


async def many_answers(ground: Ground) -> None:
    """Ask the target to coordinate sixty answers."""
    async with enemy(ground) as attacker:
        for _ in range(60):
            asked = Ask(request=os.urandom(8), prompt=(1, 2), text=_TEXT, idle_timeout_s=5, deadline_s=20)
            await attacker.say(asked)
        if not await attacker.until(lambda: len(_refused(attacker)) >= 50 or attacker.is_lost, 20):
            raise NotHeld("sixty answers of one client were begun")


def _refused(attacker: Enemy) -> list[AnswerEnd]:
    return [each for each in attacker.heard if isinstance(each, AnswerEnd) and each.error is FailureKind.CAPACITY]


async def a_flood_of_pings(ground: Ground) -> None:
    """Send three thousand pings: they are read at the pace of two hundred a second, and others are not delayed."""
    async with enemy(ground) as attacker, enemy(ground) as honest, trio.open_nursery() as nursery:
        nursery.start_soon(_pings, attacker, 3000)
        await trio.sleep(0.5)
        if not await honest.answers_ping(5):
            raise NotHeld("a flood delayed another peer")
        nursery.cancel_scope.cancel()


async def _pings(attacker: Enemy, count: int) -> None:
    for number in range(count):
        await attacker.say(Ping(nonce=number))


async def answers_that_nobody_reads(ground: Ground) -> None:
    """Ask for large answers and read none."""
    async with enemy(ground, reads=False) as attacker, enemy(ground) as honest, trio.open_nursery() as nursery:
        nursery.start_soon(_pings, attacker, 2000)
        await trio.sleep(1)
        if not await honest.answers_ping(5):
            raise NotHeld("a peer that reads nothing delayed another")
        nursery.cancel_scope.cancel()


async def junk_frames(ground: Ground) -> None:
    """Send frames of junk."""
    async with enemy(ground) as attacker:
        await attacker.raw(os.urandom(2000))
        await attacker.must_be_dropped("it sent junk")


async def a_huge_header(ground: Ground) -> None:
    """Announce a header of sixteen megabytes."""
    async with enemy(ground) as attacker:
        frame = bytes((PROTOCOL_VERSION,)) + (1 << 24).to_bytes(4, "little")[:3] + bytes(100)
        await attacker.raw(frame)
        await attacker.must_be_dropped("its header is too large")


async def rules_broken_again_and_again(ground: Ground) -> None:
    """Break the protocol with one key until it is not let in any more, which must be after the fifth time."""
    invite, seed = ground.invite(), os.urandom(32)
    for _ in range(7):
        async with enemy(ground, invite, seed=seed, is_greeting=False) as attacker:
            await attacker.greet()
            if not await attacker.hears(Hello, 20):
                return
            await attacker.raw(os.urandom(100))
            await attacker.is_dropped(10)
    raise NotHeld("it broke the protocol seven times and was let in again")


ATTACKS = (
    open_in_anothers_name,
    open_without_a_signature,
    open_a_changed_opening,
    take_over_a_session,
    windows_for_anothers_session,
    rows_of_an_unaudited_session,
    the_same_rows_again,
    rows_beyond_a_piece,
    many_checks,
    check_of_another_size,
    verdict_from_a_client,
    too_many_sessions,
    many_keys_of_one_invite,
    the_whole_cache,
    session_without_windows,
    windows_that_break_rules,
    tokens_outside_the_vocabulary,
    a_route_with_a_gap,
    another_model,
    a_schema_that_explodes,
    many_answers,
    a_flood_of_pings,
    answers_that_nobody_reads,
    junk_frames,
    a_huge_header,
    rules_broken_again_and_again,
)
