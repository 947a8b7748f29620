"""Who belongs to a swarm and who is alive: grants, invites, records, registry, without a network."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from membership_keys import NOW_S, OWNER, STRANGER, invite, key
from msgspec.structs import replace

from dsd_p2p.errors import CapacityError, ConfigError, LocalProtocolError, RemoteProtocolError
from dsd_p2p.keys import SigningKey, is_signed_by, peer_of, public_of
from dsd_p2p.swarm.admission import Admission, Authority
from dsd_p2p.swarm.grants import check_grants, issue, revoke
from dsd_p2p.swarm.invite import parse_invite
from dsd_p2p.swarm.records import check_record, sign_record
from dsd_p2p.swarm.registry import Registry
from dsd_p2p.types import PeerInfo, Span
from dsd_p2p.wire.codec import decode, encode
from dsd_p2p.wire.membership import Grant, Heard, Heartbeat, MemberRecord, Members, MemberState, PeerProfile, Role
from node.member.state import SwarmState


def record(member: SigningKey, *, grants=None, age=(NOW_S * 1000, NOW_S * 1000), span=None, **changes) -> MemberRecord:
    info = PeerInfo(peer=member.peer, addresses=("/x",), span=span, num_layers=30 if span else 0)
    made = MemberRecord(
        info=info,
        incarnation=age[0],
        sequence=age[1],
        state=MemberState.SERVING,
        grants=invite().admit(member.public) if grants is None else grants,
    )
    return sign_record(replace(made, **changes), member)


def registry(me: SigningKey | None = None) -> Registry:
    return Registry(me=(me or key(9)).peer, swarm=OWNER.public, interval_s=1.0)


def beat(number: int, *heard: Heard) -> Heartbeat:
    return Heartbeat(beat=number, view=bytes(8), heard=heard)


def test_a_peer_id_contains_its_key_as_libp2p_makes_it():
    from libp2p.crypto.ed25519 import Ed25519PrivateKey
    from libp2p.peer.id import ID

    private = Ed25519PrivateKey.from_bytes(b"k" * 32)
    ours = SigningKey(b"k" * 32)
    assert ours.peer == str(ID.from_pubkey(private.get_public_key()))
    assert public_of(ours.peer) == ours.public
    assert is_signed_by(ours.public, private.sign(b"text"), b"text")
    for bad in ("", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0OIl", peer_of(b"x" * 33)):
        with pytest.raises(RemoteProtocolError, match="ed25519"):
            public_of(bad)


def test_an_invite_survives_being_copied_and_nothing_else():
    text = str(invite())
    assert parse_invite(f"  {text}\n") == invite()
    for bad in ("", "hello", text[:-1], text[1:], text.swapcase(), "dsd1", "dsd1" + "z" * 5000, text + "1"):
        with pytest.raises(ConfigError):
            parse_invite(bad)


def test_the_chain_of_grants_lets_in_whom_it_should():
    for role in Role:
        grants = invite(role=role).admit(key(1).public)
        assert check_grants(grants, swarm=OWNER.public, peer=key(1).peer, now_s=NOW_S) is role
    own = (issue(OWNER, key(1).public, role=Role.STAGE, expires_at_s=NOW_S + 1),)
    assert check_grants(own, swarm=OWNER.public, peer=key(1).peer, now_s=NOW_S) is Role.STAGE
    client = issue(key(1), key(2).public, role=Role.CLIENT, expires_at_s=NOW_S + 1)
    grants = (*invite().admit(key(1).public), client)
    assert check_grants(grants, swarm=OWNER.public, peer=key(2).peer, now_s=NOW_S) is Role.CLIENT


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda g: (), "dsd invite"),
        (lambda g: invite(owner=STRANGER).admit(key(1).public), "one of this swarm"),
        (lambda g: invite(expires_at_s=NOW_S).admit(key(1).public), "expired"),
        (lambda g: invite().admit(key(2).public), "a grant for the peer that shows it"),
        (lambda g: (g[0],), "a grant for the peer that shows it"),
        (lambda g: (replace(g[0], role=Role.CLIENT), g[1]), "its issuer's"),
        (lambda g: (replace(g[0], expires_at_s=NOW_S * 2), g[1]), "its issuer's"),
        (lambda g: (replace(g[0], max_uses=99), g[1]), "its issuer's"),
        (lambda g: (g[0], replace(g[1], issuer=STRANGER.public)), "its issuer's"),
        (
            lambda g: (g[0], issue(STRANGER, key(1).public, role=Role.STAGE, expires_at_s=NOW_S + 9)),
            "the key that the previous grant names",
        ),
        (
            lambda g: (g[0], issue(key(3), key(1).public, role=Role.STAGE, expires_at_s=NOW_S + 9)),
            "the key that the previous grant names",
        ),
        (lambda g: (*invite(role=Role.CLIENT).grants, stage_by_invite()), "client, the only role"),
        (lambda g: invite(max_uses=0).admit(key(1).public), "may not issue any"),
        (lambda g: (*invite().admit(key(4).public), stage_by(key(4))), "client, the only role"),
    ],
)
def test_a_forged_chain_lets_nobody_in(spoil, words):
    grants = spoil(invite().admit(key(1).public))
    with pytest.raises(RemoteProtocolError, match=words):
        check_grants(grants, swarm=OWNER.public, peer=key(1).peer, now_s=NOW_S)


def stage_by_invite() -> Grant:
    return issue(SigningKey(b"i" * 32), key(1).public, role=Role.STAGE, expires_at_s=NOW_S + 9)


def stage_by(issuer: SigningKey) -> Grant:
    return issue(issuer, key(1).public, role=Role.STAGE, expires_at_s=NOW_S + 9)


@given(st.integers(0, 1), st.sampled_from(Grant.__struct_fields__), st.data())
def test_no_field_of_a_grant_can_be_changed(index, field, data):
    grants = list(invite().admit(key(1).public))
    old = getattr(grants[index], field)
    match old:
        case Role():
            new = Role.CLIENT
        case int():
            new = data.draw(st.integers(0, 1 << 20).filter(lambda v: v != old))
        case bytes():
            new = data.draw(st.binary(min_size=len(old), max_size=len(old)).filter(lambda v: v != old))
    grants[index] = replace(grants[index], **{field: new})
    with pytest.raises(RemoteProtocolError):
        check_grants(grants, swarm=OWNER.public, peer=key(1).peer, now_s=NOW_S)


def test_an_invite_is_used_as_often_as_it_says():
    known = registry()
    known.admission.admit(key(1).peer, invite().admit(key(1).public), NOW_S)
    known.admission.admit(key(2).peer, invite().admit(key(2).public), NOW_S)
    known.admission.admit(key(1).peer, invite().admit(key(1).public), NOW_S)
    with pytest.raises(RemoteProtocolError, match="used by 2 others"):
        known.admission.admit(key(3).peer, invite().admit(key(3).public), NOW_S)
    other = invite(seed=b"j" * 32)
    known.admission.admit(key(3).peer, other.admit(key(3).public), NOW_S)


def test_a_revoked_peer_or_invite_is_out_at_once():
    for subject in (key(1).public, SigningKey(b"i" * 32).public):
        known = registry()
        known.merge(record(key(1)), NOW_S)
        known.heard(key(1).peer, beat(1), 0.0)
        assert known.admission.revoke(revoke(OWNER, OWNER.public, subject))
        assert not known.admission.revoke(revoke(OWNER, OWNER.public, subject)), "no news"
        assert known.sweep(0.1, NOW_S) == [(key(1).peer, "revoked")]
        assert not known.is_alive(key(1).peer)
        with pytest.raises(RemoteProtocolError, match="revoked"):
            known.merge(record(key(1), age=(NOW_S * 1000, NOW_S * 1000 + 1)), NOW_S)
    with pytest.raises(RemoteProtocolError, match="owner's"):
        registry().admission.revoke(revoke(STRANGER, OWNER.public, key(1).public))
    with pytest.raises(RemoteProtocolError, match="owner's"):
        registry().admission.revoke(revoke(OWNER, STRANGER.public, key(1).public))


def test_members_go_when_their_invite_expires():
    known = registry()
    known.merge(record(key(1)), NOW_S)
    assert known.sweep(0.0, NOW_S + 99) == []
    assert known.sweep(0.0, NOW_S + 100) == [(key(1).peer, "its invite expired")]
    assert known.records == ()


def test_a_restarted_member_counts_once_and_an_old_record_never_wins():
    known = registry()
    start = NOW_S * 1000
    assert known.merge(record(key(1), age=(start, start + 5)), NOW_S)
    assert not known.merge(record(key(1), age=(start, start + 5)), NOW_S)
    assert not known.merge(record(key(1), age=(start, start + 4)), NOW_S)
    assert known.merge(record(key(1), age=(start + 9, start + 9), span=Span(0, 3)), NOW_S)
    assert not known.merge(record(key(1), age=(start, start + 100)), NOW_S), "of the life before"
    assert [r.info.span for r in known.records] == [Span(0, 3)]


def test_records_are_what_their_peer_signed():
    good = record(key(1), span=Span(0, 10))
    check_record(good)
    for bad in (
        replace(good, state=MemberState.LEFT),
        replace(good, incarnation=good.incarnation + 1),
        replace(good, info=replace(good.info, peer=key(2).peer)),
        replace(good, info=replace(good.info, span=Span(0, 11))),
    ):
        with pytest.raises(RemoteProtocolError, match="a signature by the peer"):
            registry().merge(bad, NOW_S)
    with pytest.raises(RemoteProtocolError, match="30 layers"):
        registry().merge(record(key(1), span=Span(5, 31)), NOW_S)
    with pytest.raises(RemoteProtocolError, match="clients"):
        registry().merge(record(key(1), span=Span(0, 1), grants=invite(role=Role.CLIENT).admit(key(1).public)), NOW_S)
    with pytest.raises(RemoteProtocolError, match="NTP"):
        registry().merge(record(key(1), age=(NOW_S * 1000, NOW_S * 1000 + 4_000_000)), NOW_S)
    assert not registry().merge(record(key(1)), NOW_S + 90 + 3600 - 90 + 1), "a ghost's record is not taken in again"


def test_a_silent_member_is_gone_within_two_beats_and_back_with_the_next():
    known = registry()
    known.merge(record(key(1)), NOW_S)
    assert not known.is_alive(key(1).peer), "a record alone proves nothing"
    known.heard(key(1).peer, beat(1), 10.0)
    assert known.sweep(12.0, NOW_S) == []
    assert known.sweep(12.01, NOW_S) == [(key(1).peer, "not heard for 2.0 s")]
    assert not known.is_alive(key(1).peer)
    known.heard(key(1).peer, beat(2), 13.0)
    assert known.is_alive(key(1).peer)
    known.merge(record(key(1), age=(NOW_S * 1000, NOW_S * 1000 + 1), state=MemberState.LEFT), NOW_S)
    assert not known.is_alive(key(1).peer), "leaving is announced"


def test_a_one_way_link_is_noticed():
    known = registry()
    known.merge(record(key(1)), NOW_S)
    for second in range(5):
        known.heard(key(1).peer, beat(second), float(second))
        assert known.sweep(second, NOW_S) == []
    known.heard(key(1).peer, beat(5), 5.0)
    assert known.sweep(5.0, NOW_S) == [(key(1).peer, "does not hear us")]


def test_round_trips_come_out_of_heartbeats():
    known = registry()
    known.merge(record(key(1)), NOW_S)
    known.sent(7, 100.0)
    echo = Heard(peer=known.me, beat=7, held_us=400_000, round_trip_us=0)
    known.heard(key(1).peer, beat(1, echo), 100.5)
    (member,) = known.members()
    assert member.round_trip_s == pytest.approx(0.1)
    forged = Heard(peer=known.me, beat=8, held_us=0, round_trip_us=0)
    known.heard(key(1).peer, beat(2, forged), 101.0)
    assert known.members()[0].round_trip_s == pytest.approx(0.1), "an echo of what we never sent tells nothing"


def test_two_that_know_the_same_have_the_same_view():
    a, b = registry(), registry(key(8))
    assert a.view == b.view
    a.merge(record(key(1)), NOW_S)
    assert a.view != b.view
    b.merge(record(key(1)), NOW_S)
    assert a.view == b.view
    a.admission.revoke(revoke(OWNER, OWNER.public, key(1).public))
    assert a.view != b.view


def test_the_messages_of_a_swarm_pass_the_codec():
    for message in (beat(3, Heard(peer="x", beat=1, held_us=2, round_trip_us=3)), Members(records=(record(key(1)),))):
        assert decode(encode(message)).message == message
    with pytest.raises(RemoteProtocolError):
        decode(encode(msgspec.structs.replace(beat(1), view=b"short")))


# Authority


@pytest.mark.parametrize("age", [(1 << 50, NOW_S * 1000), (NOW_S * 1000 + 3_700_000, NOW_S * 1000)])
def test_an_incarnation_far_ahead_is_refused(age):
    with pytest.raises(RemoteProtocolError, match="record time"):
        registry().merge(record(key(1), age=age), NOW_S)


def test_uses_and_revocations_outlive_a_restart():
    stored = []
    grants = [invite(max_uses=1).admit(key(number).public) for number in (1, 2)]
    before = Admission(OWNER.public, stored.append)
    before.admit(key(1).peer, grants[0], NOW_S)
    before.admit(key(1).peer, grants[0], NOW_S)
    assert len(stored) == 1, "only news is stored"
    before.revoke(revoke(OWNER, OWNER.public, key(3).public))
    after = Admission(OWNER.public)
    after.recall(msgspec.msgpack.decode(msgspec.msgpack.encode(stored[-1]), type=Authority))
    with pytest.raises(RemoteProtocolError, match="used by 1 others"):
        after.admit(key(2).peer, grants[1], NOW_S)
    assert after.admit(key(1).peer, grants[0], NOW_S) is Role.STAGE
    with pytest.raises(RemoteProtocolError, match="revoked"):
        after.admit(key(3).peer, invite(seed=b"j" * 32).admit(key(3).public), NOW_S)


def test_a_use_that_cannot_be_stored_lets_nobody_in():
    def full(_authority):
        raise CapacityError("no space")

    admission = Admission(OWNER.public, full)
    for _ in range(2):
        with pytest.raises(CapacityError):
            admission.admit(key(1).peer, invite(max_uses=1).admit(key(1).public), NOW_S)
    assert not [keys for _, keys in admission.stored.uses if keys]


def test_stored_revocations_of_another_swarm_are_refused():
    foreign = Authority(revocations=(revoke(STRANGER, STRANGER.public, key(1).public),))
    with pytest.raises(RemoteProtocolError, match="revocation signature"):
        Admission(OWNER.public).recall(foreign)


def test_who_never_publishes_a_record_is_swept_too():
    mine = registry()
    for number in (1, 2):
        grants = invite(seed=bytes([number]) * 32, expires_at_s=NOW_S + 50 * number).admit(key(number).public)
        mine.admission.admit(key(number).peer, grants, NOW_S)
        mine.admission.connected(key(number).peer, grants)
    assert mine.sweep(0.0, NOW_S) == []
    mine.admission.revoke(revoke(OWNER, OWNER.public, key(2).public))
    assert mine.sweep(1.0, NOW_S + 60) == [(key(1).peer, "its invite expired"), (key(2).peer, "revoked")]
    mine.lost(key(1).peer)
    assert [peer for peer, _ in mine.sweep(2.0, NOW_S + 60)] == [key(2).peer]


_small = st.integers(0, 1 << 20)


@given(
    incarnation=st.integers(-5, 1 << 52),
    profile=st.builds(
        PeerProfile, layer_us=_small | st.just(1 << 60), max_layers=_small, drafter=st.text(max_size=400)
    ),
    addresses=st.lists(st.text(max_size=300), max_size=40),
    version=st.text(max_size=400),
)
def test_nothing_that_we_sign_is_outside_what_others_read(incarnation, profile, addresses, version):
    mine = key(1)
    made = MemberRecord(
        info=PeerInfo(peer=mine.peer, addresses=tuple(addresses)),
        incarnation=incarnation,
        sequence=NOW_S * 1000,
        state=MemberState.SERVING,
        grants=invite().admit(mine.public),
        profile=profile,
        version=version,
    )
    try:
        signed = sign_record(made, mine)
    except LocalProtocolError:
        return
    assert decode(encode(Members(records=(signed,))))[0].records == (signed,)
    check_record(signed)


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        ({"profile": PeerProfile(max_layers=3)}, "max_layers"),
        ({"profile": PeerProfile(drafter="ngram")}, "drafter"),
        ({"info": PeerInfo(peer=key(1).peer, addresses=(), span=Span(0, 2), num_layers=2)}, "span"),
    ],
)
def test_a_client_offers_nothing(offer, words):
    """A client that called itself a coordinator was chosen over honest ones, and read prompts."""
    grants = invite(role=Role.CLIENT).admit(key(1).public)
    with pytest.raises(RemoteProtocolError, match=f"{words}: expected none, because its invite is for clients"):
        registry().merge(record(key(1), grants=grants, **offer), NOW_S)
    assert registry().merge(record(key(1), grants=grants), NOW_S)


def test_the_owner_comes_back_from_the_recovery_key(tmp_path):
    first, other = SwarmState(f"{tmp_path}/first"), SwarmState(f"{tmp_path}/other")
    swarm = first.create(model="m", dtype="float32", digest="d").swarm
    words = first.recovery_key()
    first.owner_file.unlink()
    with pytest.raises(ConfigError, match="dsd recover"):
        first.owner_key()
    for wrong in (words[:-1], "dsdowner1", "", words.replace("dsdowner1", "dsd1")):
        with pytest.raises(ConfigError, match="recovery key"):
            first.recover_owner(wrong)
    first.recover_owner(words)
    assert first.owner_key().public == swarm
    assert first.owner_file.stat().st_mode & 0o077 == 0
    other.create(model="m", dtype="float32", digest="d")
    with pytest.raises(ConfigError, match="not that of swarm"):
        other.recover_owner(words)


def test_a_new_network_key_is_stored(tmp_path):
    state = SwarmState(f"{tmp_path}/swarm")
    before = state.create(model="m", dtype="float32", digest="d")
    state.change_network_key(bytes(range(32)), 5)
    after = state.membership()
    assert (after.network_key, after.key_made_at_ms) == (bytes(range(32)), 5)
    assert after.grants == before.grants
    # A command that began earlier must not bring an older key back.
    state.change_network_key(bytes(32), 4)
    assert state.membership() == after
