"""What is known about reuse: points that outlive their pages, bounded, counted in integers, the same on every rank."""

from __future__ import annotations

import numpy as np

from jaxcache.core.eviction.duel import SetDuel
from jaxcache.core.eviction.reuse_profile import NUM_KINDS, PAUSES, SHARES, USES, ReuseProfile, age_edges, index, kind
from jaxcache.core.invariants import all_nodes
from jaxcache.replay import workloads
from jaxcache.replay.replay import Replay, Setting
from tests.core.helpers import FULL, PAGE, Server, prompt, window


def server_with_profile(*components, **fields) -> tuple[Server, ReuseProfile]:
    server = Server(*components, **{"device_pages": 16, "eviction_policy": "adaptive", **fields})
    profile = server.core.tiers.profile
    assert profile is not None
    return server, profile


def replayed(num_requests: int, seed: int = 0) -> ReuseProfile:
    replay = Replay(Setting(16, 20 * 9 * 16, policy="adaptive"))
    for request in workloads.requests(workloads.scan(np.random.default_rng(seed), 20), num_requests, 8, 16):
        replay.request(request)
    profile = replay.core.tiers.profile
    assert profile is not None
    return profile


def test_points_are_found_again_after_their_pages_left():
    server, profile = server_with_profile()
    server.prefill(prompt(16))
    server.flush_device()
    assert server.core.tiers.tree.num_nodes == 0
    now = profile.now
    server.prefill(prompt(16))
    (node,) = all_nodes(server.core)
    assert (node.hits, node.use.count, node.use.at) == (0, 1, now)


def test_another_prompt_with_the_same_page_elsewhere_is_another_point():
    server, profile = server_with_profile()
    server.prefill(prompt(16))
    server.prefill([*prompt(4, 1000), *prompt(12)])
    assert len(profile._slots) == 8
    assert not (profile._count[list(profile._slots.values())] > 0).any()


def test_namespaces_share_no_points():
    server, profile = server_with_profile()
    server.prefill(prompt(16))
    server.prefill(server.sequence(prompt(16), server.core.new_namespace(model="other")))
    assert len(profile._slots) == 8


def test_memory_is_bounded_and_the_oldest_points_are_forgotten():
    server, profile = server_with_profile()
    profile.max_points = 100
    for i in range(80):
        server.prefill(prompt(4 * PAGE, 1000 * i))
    assert 90 <= len(profile._slots) <= 100 + 4 * PAGE
    assert len(profile._slots) + len(profile._free) == len(profile._at)
    for i, count in ((79, 1), (0, 0)):
        server.prefill(prompt(4 * PAGE, 1000 * i))
        (node,) = (node for node in all_nodes(server.core) if node.start == 0 and node.use.at == profile.now - 16)
        assert node.use.count == count


def test_what_leaves_the_memory_is_said_by_uses_alone():
    """R9: last used first, of one prompt the end first; that the hashes of points differ changes nothing."""
    server, profile = server_with_profile()
    profile.max_points = 40
    for first in (0, 1000, 2000, 0, 3000):
        server.prefill(prompt(10 * PAGE, first))
    profile._forget()
    assert len(profile._slots) == 36
    assert all(profile._point_of[slot] == point for point, slot in profile._slots.items())
    of_1000 = [point for point, slot in profile._slots.items() if profile._at[slot] == 10 * PAGE]
    assert sorted((point >> 32 & (1 << 32) - 1) // 4 for point in of_1000) == [PAGE * (1 + i) for i in range(6)]


def test_memory_is_bounded_while_long_outputs_follow_short_prompts():
    """No time passes for the profile then, so it does not count anew; yet the points come."""
    server, profile = server_with_profile(device_pages=400)
    profile.max_points = 100
    for i in range(10):
        sequence = server.sequence(prompt(PAGE, 1000 * i))
        server.prefill(sequence)
        sequence.extend(prompt(80 * PAGE, 1000 * i + 500))
        server.prefill(sequence)
        assert len(profile._slots) <= 125
    assert profile._counted < profile.now == 10 * PAGE
    assert len(profile._slots) + len(profile._free) == len(profile._at)


def test_uses_and_exposure_are_counted_in_integers():
    """A point that is used after so many tokens counts once, at that age; until then it was at risk."""
    server, profile = server_with_profile()
    assert profile._uses.dtype == profile._exposure.dtype == np.int64
    for first in (0, 1000, 2000, 0):
        server.prefill(prompt(16, first))
    assert profile._uses.sum() == 4
    (at,) = np.flatnonzero(profile._uses.sum(0))
    assert at == np.searchsorted(profile.edges, 48)
    before = int(profile._exposure.sum())
    profile._recount()
    assert int(profile._exposure.sum()) - before == 12 * (profile.now - 48)


def test_a_split_copies_the_use():
    server, _ = server_with_profile()
    server.prefill(prompt(16))
    (node,) = all_nodes(server.core)
    prefix = server.core.tiers.split(node, 8)
    assert prefix.use == node.use


def test_nodes_end_where_the_number_of_uses_changes():
    """What leaves first should not take along what was used more often."""
    server, _ = server_with_profile()
    server.prefill(prompt(8))
    server.flush_device()
    server.prefill(prompt(16))
    assert sorted((node.end, node.use.count) for node in all_nodes(server.core)) == [(8, 1), (16, 0)]


def test_equal_histories_give_equal_values():
    first, again, other = replayed(300), replayed(300), replayed(300, seed=1)
    assert first.value.tobytes() == again.value.tobytes() != other.value.tobytes()
    assert first.version == again.version > 4


def test_before_anything_was_seen_older_is_worth_less():
    """As lru believes, and alike for all kinds."""
    profile = ReuseProfile(16, 4096, 0, True)
    assert (np.diff(profile.value) < 0).all()
    assert (profile.value == profile.value[0]).all()


def test_what_is_used_more_often_becomes_worth_more():
    profile = replayed(800)
    by_uses = profile.value.reshape(USES, SHARES, PAUSES, -1)
    age = profile.age(profile.now - profile.device_tokens // 2)
    assert by_uses[USES - 1, SHARES - 2, 3, age] > 4 * by_uses[0, 0, 0, age]


def test_a_kind_is_a_number_of_its_own():
    kinds = [kind(u, s, p) for u in range(USES) for s in range(SHARES) for p in range(PAUSES)]
    assert kinds == list(range(NUM_KINDS))


def test_ages_span_the_tiers():
    edges = age_edges(4096, 65536)
    assert edges == sorted(set(edges))
    assert edges[0] < 4096 // 8 and edges[-1] > 8 * 65536


def test_index_is_the_best_ratio_of_uses_to_time():
    """By hand: a chance of one in two, then nearly none, then one in two again, each for a step of one token."""
    hazards = np.array([1.0, 1e-9, 1.0])
    worth = index(hazards, np.array([1, 1, 1]))
    assert worth[0] == 1.0  # give up after the first step
    assert abs(worth[1] - 1 / 3) < 1e-6  # wait for the third: half a use, for one and a half tokens
    assert worth[2] == 1.0


def test_windows_and_hosts_learn_from_the_same_points():
    server, profile = server_with_profile(FULL, window(8), host_pages=16)
    for _ in range(2):
        server.prefill(prompt(17))
    assert all(residency.order.context.profile is profile for residency in server.core.tiers.residencies)
    assert {duel.capacity_tokens for duel in profile.duels} == {16 * PAGE}


# ---- the duel


def test_a_duel_starts_with_lru_and_follows_who_finds_more():
    duel = SetDuel(64)
    duel.grow(64)
    assert not duel.learned_leads
    hot = np.arange(8)
    for _ in range(8):
        duel.use(hot, 16)
        duel.by_use.leave(hot)
    assert duel.learned_leads
    for _ in range(8):
        duel.by_value.leave(hot)
        duel.use(hot, 16)
    assert not duel.learned_leads


def test_a_lead_is_bounded():
    """So that a change of habits is noticed in time."""
    duel = SetDuel(64)
    duel.grow(64)
    hot = np.arange(2)
    for _ in range(1000):
        duel.use(hot, 16)
        duel.by_use.leave(hot)
    assert duel.lead == 8


def test_room_is_made_by_the_smallest_keys():
    duel = SetDuel(64)
    duel.grow(8)
    ghost = duel.by_use
    assert ghost.use(np.arange(6)) == 0
    ghost.make_room(ghost.slots(), np.array([5, 0, 4, 1, 3, 2]), 4)
    assert ghost.slots().tolist() == [0, 2, 4, 5]
    assert ghost.num_resident == 4
    assert ghost.use(np.array([0, 1, 2])) == 1  # what follows a gap is no use
