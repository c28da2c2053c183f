"""Namespaces and page keys: what may be shared, and what never is."""

from __future__ import annotations

import itertools

import pytest

from jaxcache.core.prefetch import PrefetchState
from jaxcache.core.tokens import chain, namespace_digest
from jaxcache.types import PrefetchPolicy, TransferKind, Wait
from tests.core.helpers import FULL, PAGE, Server, prompt, server_with_storage, state, window

FIELDS = {"model": "m", "weights_version": "1", "dtype": "bfloat16", "adapter": "", "tenant_salt": "t", "extra": "x"}


def test_namespaces_never_share_a_page():
    """K1, I11."""
    server = Server(FULL, window(6), host_pages=32)
    other = server.core.new_namespace(model="test", tenant_salt="other")
    server.prefill(prompt(16))
    assert server.match(prompt(16)).num_tokens == 16
    assert server.match(prompt(16), other).num_tokens == 0
    lease = server.admit(server.sequence(prompt(16), other))
    assert lease.num_cached_tokens == 0


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_makes_a_different_namespace(name):
    """K1, X10: a salt that is left out anywhere would hand one tenant's pages to another."""
    server = Server()
    namespace = server.core.new_namespace(**FIELDS)
    other = server.core.new_namespace(**{**FIELDS, name: FIELDS[name] + "2"})
    fewer = server.core.new_namespace(**{key: value for key, value in FIELDS.items() if key != name})
    keys = [server.sequence(prompt(8), space).page_keys(2) for space in (namespace, other, fewer)]
    assert len({space.digest for space in (namespace, other, fewer)}) == 3
    assert not set(keys[0]) & {*keys[1], *keys[2]}


def test_equal_fields_are_the_same_namespace():
    server = Server()
    first = server.core.new_namespace(model="a", adapter="b")
    assert server.core.new_namespace(adapter="b", model="a") is first


def test_field_values_do_not_run_into_each_other():
    """X12: no two different sets of fields have the same digest by construction."""
    sets = [{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "", "b": "c"}, {}, {"a": ""}, {"abc": ""}]
    assert all(namespace_digest(a) != namespace_digest(b) for a, b in itertools.combinations(sets, 2))


def test_page_keys_are_chained_and_256_bits():
    """K4, X12: a key depends on the namespace and on every token up to its page's end."""
    server = Server()
    keys = server.sequence(prompt(16), server.namespace).page_keys(4)
    assert {len(key) for key in keys} == {32}
    first_token_differs = server.sequence([77, *prompt(16)[1:]]).page_keys(4)
    last_token_differs = server.sequence([*prompt(15), 77]).page_keys(4)
    assert not set(keys) & set(first_token_differs)
    assert last_token_differs[:3] == keys[:3]
    assert last_token_differs[3] != keys[3]


def test_keys_do_not_depend_on_when_they_are_computed():
    """K4: incrementally, at once, or back-filled from the tree after splits."""
    server = Server()
    sequence = server.sequence(prompt(8))
    sequence.page_keys(1)
    sequence.extend(prompt(8, 100))
    at_once = server.sequence([*prompt(8), *prompt(8, 100)])
    assert sequence.page_keys(4) == at_once.page_keys(4) == chain(server.namespace.digest, at_once.data, 4 * PAGE)
    server.prefill([*prompt(8), *prompt(8, 100)])
    server.prefill([*prompt(12 - PAGE), *prompt(8, 200)])
    path = server.core.tiers.tree.walk(at_once, 16)
    assert len(path) == 2
    assert [key for node, _ in path for key in server.core.tiers.tree.keys(node)] == at_once.page_keys(4)


def test_stored_keys_are_the_keys_of_the_namespace():
    """X10: what goes to storage carries the salt."""
    server = server_with_storage()
    salted = server.core.new_namespace(model="test", tenant_salt="s")
    server.prefill(server.sequence(prompt(8), salted))
    server.rank.apply()
    server.core.commit({})
    (store,) = server.planned(TransferKind.STORE)
    assert list(store.moves[0].page_keys) == server.sequence(prompt(8), salted).page_keys(2)
    assert not set(store.moves[0].page_keys) & set(server.sequence(prompt(8)).page_keys(2))


def test_new_weights_make_the_old_version_unreachable_at_once():
    """K5: O(1), that is without touching a node; and a namespace of equal fields, which would find it in storage, is
    refused."""
    server = Server(FULL, window(6), state(), host_pages=32)
    old = server.core.new_namespace(model="m", weights_version="1")
    waiting = server.sequence(prompt(17), old)
    server.prefill(server.sequence(prompt(16), old))
    num_nodes = server.core.tiers.tree.num_nodes
    assert server.core.match(waiting).num_tokens == 16
    server.core.retire_namespace(old)
    assert server.core.tiers.tree.num_nodes == num_nodes
    assert server.match(prompt(16), server.core.new_namespace(model="m", weights_version="2")).num_tokens == 0
    digest = server.core.digest
    with pytest.raises(ValueError, match="give the new one another weights_version"):
        server.core.new_namespace(model="m", weights_version="1")
    assert server.core.digest == digest
    assert server.admit(waiting).num_cached_tokens == 0


def test_pages_of_a_retired_namespace_are_reclaimed_as_room_is_needed():
    """K5."""
    server = Server(device_pages=8, host_pages=8)
    old = server.core.new_namespace(model="m", weights_version="1")
    server.prefill(server.sequence(prompt(24), old))
    server.core.retire_namespace(old)
    new = server.core.new_namespace(model="m", weights_version="2")
    server.prefill(server.sequence(prompt(32), new))
    assert server.match(prompt(32), new).num_tokens == 32
    server.check_empty()


def test_a_retired_namespace_is_forgotten_with_its_last_page():
    """K5: and at once if it has none; so retiring one does not look at those that were retired before."""
    server = Server(device_pages=8)
    tree = server.core.tiers.tree
    retired = [server.core.new_namespace(model="m", weights_version=str(i)) for i in range(3)]
    for i, namespace in enumerate(retired[:2]):
        server.prefill(server.sequence(prompt(12, 1000 * i), namespace))
    for namespace in retired:
        server.core.retire_namespace(namespace)
    assert [root.keys for root in tree.retired_roots.values()] == [[namespace.digest] for namespace in retired[:2]]
    server.prefill(prompt(20))
    assert [root.keys for root in tree.retired_roots.values()] == [[retired[1].digest]]
    server.prefill(prompt(32))
    assert not tree.retired_roots
    server.check_empty()


def test_a_request_goes_on_in_a_retired_namespace():
    """K5: it finishes with what it holds, and publishes nothing more."""
    server = Server(FULL, window(6), state(), host_pages=32)
    server.prefill(prompt(8))
    lease = server.admit(prompt(20))
    assert lease.num_cached_tokens == 8
    server.core.retire_namespace(server.namespace)
    server.compute(lease, 20)
    server.insert(lease, 20)
    server.decode(lease, [5, 6, 7, 8, 9])
    server.release(lease)
    server.check_empty()


def test_prefetches_of_a_retired_namespace_are_given_up():
    """K5: nothing of them can be used; their requests go on, and those of other namespaces wait as before."""
    server = server_with_storage(prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    other = server.core.prefetch(server.sequence(prompt(24), server.core.new_namespace(model="other")))
    assert other is not None
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    server.core.retire_namespace(server.namespace)
    server.check()
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.num_cached_tokens == 0
    server.compute(lease, 25)
    server.release(lease)
    assert ticket.done and not other.prefetch.cancelled
    server.settle()
    assert server.host_free() == 64
    server.check_empty()
