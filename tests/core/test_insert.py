"""Publishing: what becomes the tree's, what is given back as a duplicate, where windows and states go."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.core.lease import Lease
from jaxcache.core.node import Node
from jaxcache.testing.page_content import model_step
from jaxcache.types import Match, WritePolicy
from tests.core.helpers import FULL, NEXT, Server, prompt, state, window


def path(server: Server, tokens: list[int]) -> list[Node]:
    sequence = server.sequence([*tokens, NEXT])
    return [node for node, _ in server.core.tiers.tree.walk(sequence, len(tokens))]


def spans_with(server: Server, tokens: list[int], c: int) -> list[tuple[int, int]]:
    """Where on a path component c is on the device."""
    return [(node.start, node.end) for node in path(server, tokens) if node.pages[c] is not None]


def computed(server: Server, tokens: list[int], **options):
    lease = server.admit(tokens, **options)
    server.compute(lease, len(tokens))
    return lease


# ---- duplicates


def test_duplicates_are_freed_once_and_the_table_is_replaced():
    """N1: by a new read-only array, because a running program may still read the old one; and the loop, which may still
    have the old one, keeps its pages until it asks for tables."""
    server = Server()
    first, second = computed(server, prompt(10)), computed(server, prompt(10))
    server.insert(first, 10)
    old, free = second.page_tables["full"], server.free()
    before = old.tolist()
    server.insert(second, 10)
    new = second.page_tables["full"]
    assert server.free() == free
    for _ in range(2):
        server.core.tables_were_read([first, second])
        server.check()
        assert server.free() == free + 2
    assert old.tolist() == before
    assert new.tolist() == [*first.page_tables["full"].tolist()[:2], before[2]]
    assert not old.flags.writeable
    assert not new.flags.writeable
    assert server.core.counters["duplicate_pages"] == 2


def contents_of(server: Server, c: int, page_ids: np.ndarray) -> list[bytes]:
    return [server.plane.device[c][page_id].tobytes() for page_id in page_ids]


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6)), (FULL, window(6), state())])
@pytest.mark.parametrize("stable_tables", [False, True])
def test_a_table_that_the_loop_kept_is_good_until_it_asks_for_another(components, stable_tables):
    """What an engine needs whose tables only grow: others never get the pages that it still names."""
    server = Server(*components, stable_tables=stable_tables, device_pages=12)
    first, second = computed(server, prompt(10)), computed(server, prompt(10))
    kept = second.page_tables
    contents = {name: contents_of(server, c, kept[name]) for name, c in server.plane.numbers.items() if name in kept}
    server.insert(first, 10)
    server.insert(second, 10)
    if stable_tables:
        server.core.tables_were_read([second])
        assert {name: table.tolist() for name, table in second.page_tables.items()} == {
            name: table.tolist() for name, table in kept.items()
        }
    others = []
    while isinstance(other := server.try_admit(prompt(4, 1000 * (len(others) + 1))), Lease):
        server.compute(other, 4)  # takes and writes every page that is free
        others.append(other)
    assert others
    for name, before in contents.items():
        assert contents_of(server, server.plane.numbers[name], kept[name]) == before
    for lease in (first, second, *others):
        server.release(lease)
    server.check_empty()


def test_stable_tables_grow_and_lose_what_is_behind_the_window():
    """The pages that are behind it are given back, and their ids are num_pages: no model step reads or writes there."""
    server = Server(FULL, window(6), stable_tables=True)
    first, second = computed(server, prompt(24)), computed(server, prompt(24))
    server.insert(first, 24)
    kept = {name: table.tolist() for name, table in second.page_tables.items()}
    server.insert(second, 24)
    server.decode(second, list(range(500, 520)))
    tables = second.page_tables
    assert tables["full"].tolist()[:6] == kept["full"]
    num_pages = server.core.tiers.device[1].allocator.num_pages
    now = [now for now, before in zip(tables["window"].tolist(), kept["window"], strict=False) if now != before]
    assert now == [num_pages] * len(now)
    server.release(first)
    server.release(second)
    server.check_empty()


def test_pages_that_a_request_was_admitted_with_are_never_freed():
    """N1."""
    server = Server()
    server.prefill(prompt(8))
    lease = computed(server, prompt(9))
    free = server.free()
    server.insert(lease, 9)
    assert server.free() == free
    assert server.core.counters["duplicate_pages"] == 0


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6)), (FULL, window(6), state())])
def test_inserting_again_changes_nothing(components):
    """N2: at every chunk and decoded token, if one likes."""
    server = Server(*components)
    lease = computed(server, prompt(16))
    server.insert(lease, 16)
    free, nodes = [r.allocator.num_free for r in server.core.tiers.residencies], server.core.tiers.tree.num_nodes
    for _ in range(3):
        server.insert(lease, 16)
    assert [r.allocator.num_free for r in server.core.tiers.residencies] == free
    assert server.core.tiers.tree.num_nodes == nodes
    server.release(lease)
    server.check_empty()


def test_inserting_again_counts_no_hit():
    """N2: else write_through_selective would copy what was used once."""
    server = Server(host_pages=32, write_policy=WritePolicy.WRITE_THROUGH_SELECTIVE)
    lease = computed(server, prompt(12))
    for end in (4, 8, 12, 12, 12):
        server.insert(lease, end)
    assert not any(node.hits for node in path(server, prompt(12)))
    assert server.core.counters["backup_pages"] == 0


# ---- adoption


def test_a_node_that_was_evicted_adopts_the_pages_of_a_request():
    """N3: nothing is loaded back for it."""
    server = Server(host_pages=32)
    server.prefill(prompt(16))
    server.flush_device()
    lease = computed(server, prompt(16), max_cached_tokens=0)
    assert server.match(prompt(16)).device_tokens == 0
    server.insert(lease, 16)
    assert server.match(prompt(16)) == Match(16, 16, 0, 0, ())
    assert path(server, prompt(16))[0].pages[0].tolist() == lease.page_tables["full"].tolist()
    assert server.core.counters["duplicate_pages"] == 0
    assert server.core.counters["load_back_pages"] == 0


def without_window(server: Server, tokens: list[int]) -> None:
    """All windows of a path leave the device."""
    for node in path(server, tokens):
        if node.pages[1] is not None:
            server.core.tiers.drop(server.core.tiers.device[1], node)
    server.check()


def test_a_window_that_was_dropped_is_adopted():
    """N3."""
    server = Server(FULL, window(6))
    server.prefill(prompt(16))
    without_window(server, prompt(16))
    assert server.match(prompt(16)).num_tokens == 0
    server.prefill(prompt(16))
    assert server.match(prompt(16)).num_tokens == 16


def test_only_the_live_part_of_a_window_is_adopted():
    """N3: and a node is cut where the live window begins."""
    server = Server(FULL, window(6))
    server.prefill(prompt(32))
    without_window(server, prompt(32))
    lease = computed(server, prompt(20))
    server.insert(lease, 20)
    assert spans_with(server, prompt(32), 1) == [(8, 20)]
    server.release(lease)
    server.prefill(prompt(32), max_cached_tokens=0)
    assert spans_with(server, prompt(32), 1) == [(8, 20), (20, 32)]


# ---- leaves


def test_a_leaf_stays_although_its_window_is_absent():
    """N4, X5: a missing window never vetoes keeping full attention, nor does it stop an insert."""
    server = Server(FULL, window(6))
    server.prefill(prompt(16))
    without_window(server, prompt(16))
    assert server.match(prompt(16)) == Match(0, 0, 0, 16, (16,))
    server.prefill(prompt(24))
    assert server.match(prompt(24)).num_tokens == 24
    assert server.core.counters["duplicate_pages"] == 4


def test_pinning_a_hit_pins_one_window():
    """N4: a leaf is cut where its window begins: that of 36, where the same prompt would resume."""
    server = Server(FULL, window(6))
    server.prefill(prompt(40))
    assert spans_with(server, prompt(40), 1) == [(28, 40)]
    server.admit(prompt(41))
    full, swa = server.core.tiers.device
    assert (full.num_pinned, swa.num_pinned) == (10, 3)


# ---- states


def test_a_state_goes_where_it_is_and_a_second_one_is_freed():
    """N5."""
    server = Server(FULL, state())
    leases = [computed(server, prompt(11)) for _ in range(2)]
    for lease in leases:
        server.insert(lease, 11)
        server.release(lease)
    assert spans_with(server, prompt(8), 1) == [(0, 8)]
    assert server.free("state") == 32 - 1


def test_a_state_in_the_middle_of_a_node_splits_it():
    """N5: the node must end exactly at the state's position."""
    server = Server(FULL, state())
    server.prefill(prompt(24))
    server.prefill([*prompt(12), *prompt(12, 1000)])
    assert spans_with(server, prompt(24), 1) == [(0, 12), (12, 20), (20, 24)]
    assert server.match(prompt(12)).num_tokens == 12


# ---- output


@pytest.mark.parametrize(("evict_output_first", "victim_end"), [(True, 16), (False, 8)])
def test_generated_text_is_split_from_its_prompt_and_leaves_first(evict_output_first, victim_end):
    """N6."""
    server = Server(evict_output_first=evict_output_first)
    server.prefill(prompt(8, 5000))
    lease = computed(server, prompt(8))
    server.insert(lease, 8)
    server.decode(lease, prompt(8, 1000))
    server.release(lease)
    assert [(node.end, node.is_output) for node in path(server, [*prompt(8), *prompt(8, 1000)])][-1] == (
        16,
        evict_output_first,
    )
    victim = next(iter(server.core.tiers.device[0].order))
    assert victim.end == victim_end


def test_generated_text_that_became_a_prompt_is_ordinary():
    """N6: the next turn of a conversation."""
    server = Server()
    lease = computed(server, prompt(8))
    server.decode(lease, prompt(8, 1000))
    server.release(lease)
    server.prefill([*prompt(8), *prompt(8, 1000), *prompt(8, 2000)], max_cached_tokens=0)
    assert not any(node.is_output for node in path(server, [*prompt(8), *prompt(8, 1000)]))


# ---- checkpoints


def test_prefill_stops_where_states_are_checkpointed():
    """N7: at the grid floor of the prompt and where a branch would have needed one."""
    server = Server(FULL, state(8))
    server.prefill(prompt(30))
    lease = server.admit([*prompt(22), *prompt(12, 1000)])
    stops = []
    while lease.num_computed < 34:
        stop = lease.next_stop
        stops.append(stop)
        server.compute(lease, min(stop, 34))
        server.core.grow(lease, min(stop, 34), 1)
    assert stops == [16, 32, 40]
    server.insert(lease, 34)
    assert server.match([*prompt(22), *prompt(12, 1000)]).num_tokens == 32
    assert server.match(prompt(20)).num_tokens == 16


def test_of_the_states_passed_while_decoding_the_last_is_kept():
    """N7: without it, generated text could never be hit."""
    server = Server(FULL, state(4))
    lease = computed(server, prompt(9))
    for i in range(14):
        lease.sequence.extend([1000 + i])
        assert server.core.grow(lease, 9 + i, 1)
        server.compute(lease, 10 + i)
    server.insert(lease, 23)
    server.release(lease)
    assert spans_with(server, lease.sequence.tokens.tolist(), 1) == [(0, 8), (8, 20)]
    assert server.match(lease.sequence.tokens.tolist()).num_tokens == 20


def test_a_state_that_the_loop_does_not_say_it_has_written_is_not_published():
    """A chunk that went past the position has left the slot as it was: anything may be in it."""
    server = Server(FULL, state(4))
    lease = server.admit(prompt(10))
    assert dict(lease.checkpoints) == {8: 1}
    server.rank.apply()
    server.plane.model_step(lease, model_step(server.core, lease.sequence, 0, 10))  # not in two chunks
    server.core.insert(lease, 8)
    server.core.insert(lease, 10)
    assert server.core.counters["unwritten_states"] == 1
    assert server.match(prompt(8)).num_tokens == 0
    server.release(lease)
    server.check_empty()


def test_a_state_may_be_told_of_later_than_it_was_made():
    """`grow` says that more is computed, `insert` which slots were written."""
    server = Server(FULL, state(4))
    lease = server.admit(prompt(10))
    server.compute(lease, 8)
    assert server.core.grow(lease, 8, 2)
    server.compute(lease, 10)
    server.core.insert(lease, 10, states=[8])
    assert server.match(prompt(8)).num_tokens == 8
    server.release(lease)
    server.check_empty()


@pytest.mark.parametrize("states", [[4], [12], ["8"], [8.0], [8, 9], "8", None, 8])
def test_states_that_cannot_have_been_written(states):
    server = Server(FULL, state(4))
    lease = server.admit(prompt(13), chunk=9)
    server.compute(lease, 8)
    server.core.grow(lease, 8, 5)
    assert 12 in lease.checkpoints  # but it is not computed yet
    digest = server.core.digest
    with pytest.raises((ValueError, TypeError), match="state"):
        server.core.insert(lease, 8, states=states)
    assert (server.core.digest, lease.num_computed) == (digest, 8)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_shallow_states_of_a_path_go_first(most):
    """N7."""
    server = Server(FULL, state(4), max_states_per_path=most)
    for end in range(4, 29, 4):
        server.prefill(prompt(end))
    ends = [end for _, end in spans_with(server, prompt(28), 1)]
    assert ends == [4, 8, 12, 16, 20, 24, 28][-most:]


def test_a_missing_slot_only_costs_a_later_hit():
    """N7."""
    server = Server(FULL, state(4), device_pages={"full": 32, "state": 1})
    assert server.prefill(prompt(9)) == 0
    assert server.match(prompt(9)).unusable_tokens == 8
    server.prefill(prompt(16))
    server.check_empty()
