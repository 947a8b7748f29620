"""The owner's choice for all members: signed, the latest wins, carried by invites."""

import time

import msgspec
import pytest

from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.keys import SigningKey, peer_of
from dsd_p2p.swarm.grants import choose
from dsd_p2p.swarm.registry import Registry
from node.member.state import SwarmState

OWNER, OTHER = SigningKey(b"o" * 32), SigningKey(b"x" * 32)
NOW_S = 1_800_000_000.0


def registry():
    return Registry(me=peer_of(OTHER.public), swarm=OWNER.public, interval_s=1.0)


def test_the_latest_choice_of_the_owner_stands():
    mine = registry()
    before = mine.view
    assert mine.choose(choose(OWNER, OWNER.public, "auto", 1000), NOW_S)
    assert mine.view != before
    assert mine.choose(choose(OWNER, OWNER.public, "shadow", 2000), NOW_S)
    assert not mine.choose(choose(OWNER, OWNER.public, "ngram", 1500), NOW_S)
    assert mine.choice.draft == "shadow"


@pytest.mark.parametrize(
    "forged",
    [
        choose(OTHER, OWNER.public, "evil", 5000),
        choose(OWNER, OTHER.public, "another swarm's", 5000),
        msgspec.structs.replace(choose(OWNER, OWNER.public, "auto", 5000), draft="evil"),
        choose(OWNER, OWNER.public, "from the future", int((NOW_S + 7200) * 1000)),
    ],
)
def test_only_the_owner_chooses(forged):
    mine = registry()
    with pytest.raises(RemoteProtocolError):
        mine.choose(forged, NOW_S)
    assert mine.choice is None


def test_a_later_choice_outlives_a_restart(tmp_path):
    state = SwarmState(str(tmp_path / "s"))
    stored = state.create(model="m", dtype="float32", digest="", draft="ngram")
    assert state.choice().draft == "ngram"
    later = choose(state.owner_key(), stored.swarm, "shadow", int(time.time() * 1e3) + 10)
    state.remember(msgspec.structs.replace(state.known(), choice=later))
    assert state.choice().draft == "shadow"
