"""A caller's mistakes are named at the boundary, with the values, and change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxcache.components import FullAttention
from jaxcache.config import CacheConfig
from jaxcache.core.prefix_cache import PrefixCache
from tests.core.helpers import FULL, PAGE, Server, make_core, prompt, server_with_storage, state, window


@pytest.mark.parametrize(
    "tokens",
    [
        "text",
        7,
        None,
        [1.5, 2],
        ["a"],
        [[1, 2]],
        {1: 2},
        np.zeros((2, 2), np.int32),
        np.zeros(3, np.float32),
        np.zeros(3, bool),
        [None],
    ],
)
def test_tokens_of_a_wrong_type(tokens):
    """K6."""
    server = Server()
    with pytest.raises(TypeError, match="token ids must be"):
        server.core.sequence(tokens, server.namespace)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ([1, -1], "-1"),
        ([2**31], str(2**31)),
        ([0] * 100 + [-5], "-5"),
        (np.array([3, -2]), "-2"),
        (np.array([1, -7], np.int32), "-7"),
        (np.array([2**40]), str(2**40)),
        (np.array([2**63], np.uint64), str(2**63)),
        (np.array([2**31], np.uint32), str(2**31)),
    ],
)
def test_tokens_out_of_range(tokens, named):
    """K6: the offender is named."""
    server = Server()
    with pytest.raises(ValueError, match=f"not {named}"):
        server.core.sequence(tokens, server.namespace)
    sequence = server.sequence(prompt(8))
    with pytest.raises(ValueError, match=f"not {named}"):
        sequence.extend(tokens)
    assert sequence.num_tokens == 8


@pytest.mark.parametrize("tokens", [[], (), np.array([], np.int32)])
def test_no_tokens(tokens):
    server = Server()
    with pytest.raises(ValueError, match="at least one token"):
        server.core.sequence(tokens, server.namespace)


def test_namespace_of_another_cache():
    server, other = Server(), Server()
    with pytest.raises(ValueError, match="belongs to another cache"):
        server.core.sequence(prompt(4), other.namespace)
    with pytest.raises(ValueError, match="belongs to another cache"):
        server.core.match(other.sequence(prompt(4)))
    with pytest.raises(ValueError, match="belongs to another cache"):
        server.core.admit(other.sequence(prompt(4)), 4)
    with pytest.raises(ValueError, match="belongs to another cache"):
        server.core.retire_namespace(other.namespace)


def test_retired_namespace():
    """K5."""
    server = Server()
    server.core.retire_namespace(server.namespace)
    with pytest.raises(ValueError, match="was retired"):
        server.sequence(prompt(4))
    with pytest.raises(ValueError, match="was retired"):
        server.core.retire_namespace(server.namespace)


@pytest.mark.parametrize("wrong", [None, "model", 3])
def test_what_is_no_namespace(wrong):
    server = Server()
    with pytest.raises(TypeError, match="Namespace"):
        server.core.sequence(prompt(4), wrong)
    with pytest.raises(TypeError, match="Namespace"):
        server.core.retire_namespace(wrong)
    with pytest.raises(TypeError, match="'model' must be a str"):
        server.core.new_namespace(model=wrong if wrong != "model" else 1)  # pyright: ignore


@pytest.mark.parametrize("call", ["match", "prefetch", "explain"])
def test_tokens_where_a_sequence_is_needed(call):
    core: Any = make_core()
    with pytest.raises(TypeError, match=r"cache\.sequence"):
        getattr(core, call)(prompt(4))
    with pytest.raises(TypeError, match=r"cache\.sequence"):
        core.admit(prompt(4), 4)


@pytest.mark.parametrize(("num_new_tokens", "cap"), [(0, None), (-1, None), (4, -1)])
def test_admit_with_a_bad_number(num_new_tokens, cap):
    server = Server()
    with pytest.raises(ValueError, match=r"num_new_tokens=|max_cached_tokens="):
        server.core.admit(server.sequence(prompt(4)), num_new_tokens, max_cached_tokens=cap)
    server.check()


def test_a_lease_is_released_once():
    """A5."""
    server = Server()
    lease = server.admit(prompt(8))
    server.release(lease)
    free = server.free()
    for use in (
        lambda: server.core.release(lease),
        lambda: server.core.insert(lease, 8),
        lambda: server.core.grow(lease, 8, 1),
    ):
        with pytest.raises(ValueError, match="was released already"):
            use()
    assert server.free() == free


def test_a_wait_is_no_lease():
    server = Server(device_pages=4)
    wait: Any = server.try_admit(prompt(40))
    for use in (
        lambda: server.core.release(wait),
        lambda: server.core.insert(wait, 8),
        lambda: server.core.grow(wait, 8, 1),
    ):
        with pytest.raises(TypeError, match="did admit answer Wait"):
            use()


def test_a_lease_of_another_cache():
    server, other = Server(), Server()
    server.admit(prompt(8))
    lease = other.admit(prompt(8))
    with pytest.raises(ValueError, match="belongs to another cache"):
        server.core.release(lease)


def test_computed_tokens_must_be_plausible():
    """Not less than before, not beyond the lease's room, not beyond the sequence."""
    server = Server()
    lease = server.admit(prompt(8), chunk=12)
    server.compute(lease, 8)
    server.insert(lease, 8)
    with pytest.raises(ValueError, match="num_computed=4"):
        server.core.insert(lease, 4)
    with pytest.raises(ValueError, match="num_computed=13"):
        server.core.grow(lease, 13, 4)
    with pytest.raises(ValueError, match=r"call sequence\.extend first"):
        server.core.insert(lease, 10)
    with pytest.raises(ValueError, match="num_new_tokens=0"):
        server.core.grow(lease, 8, 0)
    server.check()
    server.decode(lease, [1])


def test_a_ticket_of_another_sequence_or_cache():
    server, other = server_with_storage(), server_with_storage()
    ticket: Any = server.prefetch(prompt(16))
    with pytest.raises(ValueError, match="another sequence"):
        server.core.admit(server.sequence(prompt(16)), 4, ticket)
    with pytest.raises(ValueError, match="belongs to another cache"):
        other.core.cancel(ticket)
    with pytest.raises(TypeError, match="a Ticket is needed"):
        server.core.cancel(None)  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"page_tokens": 0}, "page_tokens must be an int of at least 1, not 0"),
        ({"page_tokens": 4.0}, "page_tokens must be an int of at least 1, not 4.0"),
        ({"page_tokens": True}, "page_tokens must be an int of at least 1, not True"),
        ({"device_pages": 0}, "component 'full' needs an int of at least 1 pages, not 0"),
        ({"device_pages": {}}, "component 'full' needs an int of at least 1 pages, not None"),
        ({"host_pages": -1}, "component 'full' needs an int of at least 0 pages, not -1"),
        ({"host_pages": {"ful": 4, "full": 4}}, r"\['ful'\]"),
        ({"write_policy": "write_through"}, "write_policy must be a WritePolicy, not 'write_through'"),
        ({"prefetch_policy": None}, "prefetch_policy must be a PrefetchPolicy, not None"),
        ({"prefetch_host_share": 0}, "prefetch_host_share=0"),
        ({"prefetch_host_share": 1.5}, "prefetch_host_share=1.5"),
        ({"storage_deadline_s": 0}, "storage_deadline_s=0"),
        ({"eviction_policy": "newest"}, "eviction_policy must be one of .*'newest'"),
        ({"max_stores": 0}, "max_stores must be an int of at least 1, not 0"),
        ({"load_back_min_tokens": -4}, "load_back_min_tokens must be an int of at least 1, not -4"),
    ],
)
def test_config_errors_name_the_values(fields, named):
    """K3."""
    with pytest.raises(ValueError, match=named):
        PrefixCache((FULL,), CacheConfig(**{"page_tokens": PAGE, "device_pages": 8, **fields}))


@pytest.mark.parametrize(
    ("components", "named"),
    [
        ((), r"different names, not \[\]"),
        ((FULL, FULL), r"different names, not \['full', 'full'\]"),
        ((FULL, FullAttention("more", ())), r"\['full', 'more'\] live and move together"),
    ],
)
def test_components_that_do_not_fit_together(components, named):
    with pytest.raises(ValueError, match=named):
        PrefixCache(components, CacheConfig(page_tokens=PAGE, device_pages=8))


@pytest.mark.parametrize(("make", "named"), [(window, "window_tokens=0"), (state, "chunk_tokens=0")])
def test_components_with_a_bad_number(make, named):
    with pytest.raises(ValueError, match=named):
        make(0)
