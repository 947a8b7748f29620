"""What a peer may take, alone and with all that came with its invite; and what breaking the protocol costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd_p2p.coordination.swarm_directory import believed_s
from dsd_p2p.errors import CapacityError
from dsd_p2p.peers.offences import Offences
from dsd_p2p.peers.scopes import Scopes

SCOPES = Scopes(what="things", node=10, root=6, peer=3)


def root_of(peer):
    return peer[0]


@given(st.lists(st.tuples(st.sampled_from(["a1", "a2", "a3", "b1", "b2", "c1"]), st.integers(1, 3)), max_size=60))
def test_no_order_of_requests_passes_a_bound(requests):
    held = []
    for peer, amount in requests:
        try:
            SCOPES.check(held, peer, amount, root_of)
        except CapacityError:
            continue
        held.append((peer, amount))
    taken = {peer: sum(amount for each, amount in held if each == peer) for peer, _ in held}
    assert sum(taken.values()) <= 10
    assert all(amount <= 3 for amount in taken.values())
    assert all(sum(taken[peer] for peer in taken if peer[0] == root) <= 6 for root in "abc")


def test_the_first_is_refused_only_for_what_all_hold():
    SCOPES.check([("b1", 2)], "a1", 8, root_of)
    with pytest.raises(CapacityError, match="taken here"):
        SCOPES.check([("b1", 3)], "a1", 8, root_of)
    with pytest.raises(CapacityError, match="yours"):
        SCOPES.check([("a1", 1)], "a1", 8, root_of)


@pytest.mark.parametrize(
    ("held", "whose"),
    [
        ([("a1", 3)], "3 of 3 things are yours"),
        ([("a2", 3), ("a3", 3)], "6 of 6 things belong to peers of your invite"),
        ([("b1", 3), ("b2", 3), ("c1", 3), ("d1", 1)], "10 of 10 things are taken here"),
    ],
)
def test_a_refusal_says_whose_bound_is_reached(held, whose):
    with pytest.raises(CapacityError, match=whose):
        SCOPES.check(held, "a1", 1, root_of)


def test_offences_slow_then_ban_then_are_forgotten():
    offences, now_s = Offences(), 100.0
    penalties = []
    for _ in range(12):
        penalties.append(offences.note("mallory", now_s))
        now_s += 1
    assert penalties[:5] == [2, 4, 8, 16, 32]
    assert max(penalties) == 600
    assert offences.ban_left_s("mallory", now_s) > 500
    assert offences.ban_left_s("somebody", now_s) == 0
    assert offences.ban_left_s("mallory", now_s + 601) == 0
    assert offences.note("mallory", now_s + 1300) == 2


def test_one_offence_bans_nobody():
    offences = Offences()
    offences.note("clumsy", 0.0)
    assert offences.ban_left_s("clumsy", 0.1) == 0


def test_offences_of_many_are_bounded():
    offences = Offences()
    for number in range(5000):
        offences.note(f"peer{number}", 0.0)
    assert len(offences._records) == 1024


@pytest.mark.parametrize(
    ("told", "believed"),
    [
        ([0.001, 0.002, 0.004], [0.001, 0.002, 0.004]),
        ([0.000001, 0.002, 0.004], [0.00025, 0.002, 0.004]),
        ([0.0, 0.002, 0.004], [0.004, 0.002, 0.004]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([], []),
    ],
)
def test_what_peers_tell_of_themselves_is_believed_within_reason(told, believed):
    assert believed_s(told) == pytest.approx(believed)
