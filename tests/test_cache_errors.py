"""What the face refuses, and that the cache goes on serving: a test ends with a hit that equals its miss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.components import FieldSpec, FullAttention
from jaxcache.pools import device_pool
from tests.models.serving import (
    DEVICE_PAGES,
    PAGE_TOKENS,
    Driver,
    Rig,
    check_equal,
    random_tokens,
    reference,
    rig_on,
)

PROMPT = random_tokens(1, 45)
OTHER = random_tokens(2, 45)


@pytest.fixture
def rig(make_mesh) -> Rig:
    return rig_on(make_mesh())


@pytest.fixture
def driver(rig) -> Iterator[Driver]:
    """A driver whose cache holds the prompt, and after the test serves it still."""
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        yield driver
        serves_a_hit(driver)


@pytest.fixture
def other(rig) -> Iterator[Driver]:
    """Another cache."""
    with rig.cache() as cache:
        yield Driver(rig, cache)


def serves_a_hit(driver: Driver) -> None:
    got = driver.ask(PROMPT)
    assert sum(got.hits) == 44
    check_equal(got, reference(driver.rig.mesh, tuple(PROMPT.tolist())))


# ---- tokens and namespaces


@pytest.mark.parametrize(
    "tokens",
    ["text", [1.5], [[1, 2]], ["1"], [None], None, 7, np.ones(3), np.ones((2, 2), int), np.array([True]), {1: 2}],
    ids=repr,
)
def test_tokens_of_a_wrong_type(driver, tokens):
    with pytest.raises(TypeError, match="token ids must be"):
        driver.sequence(tokens)


@pytest.mark.parametrize(
    "tokens",
    [[1, -1], [2**31], [2**70], np.array([3, -2]), np.array([2**31], np.uint32), [0] * 70 + [-5]],
    ids=lambda tokens: repr(tokens)[-16:],
)
def test_tokens_out_of_range(driver, tokens):
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 2147483647\], not "):
        driver.sequence(tokens)


@pytest.mark.parametrize("tokens", [[], (), np.array([], np.int32)], ids=repr)
def test_no_tokens(driver, tokens):
    with pytest.raises(ValueError, match="at least one token"):
        driver.sequence(tokens)


def test_bad_tokens_do_not_extend_a_sequence(driver):
    sequence = driver.sequence(PROMPT)
    for tokens in ([1.5], [-1]):
        with pytest.raises((TypeError, ValueError), match="token ids"):
            sequence.extend(tokens)
    assert sequence.num_tokens == 45


def test_tokens_of_every_kind_are_the_same_sequence(driver):
    kinds = (PROMPT, PROMPT.tolist(), tuple(PROMPT.tolist()), PROMPT.astype(np.int64), jax.numpy.asarray(PROMPT))
    for tokens in kinds:
        assert driver.cache.match(driver.sequence(tokens)).num_tokens == 44


def test_namespace_of_another_cache(driver, other):
    with pytest.raises(ValueError, match="belongs to another cache"):
        driver.cache.sequence(PROMPT, other.namespace)
    with pytest.raises(ValueError, match="belongs to another cache"):
        driver.cache.retire_namespace(other.namespace)


def test_something_that_is_no_namespace(driver):
    with pytest.raises(TypeError, match="a Namespace of this cache is needed, not str"):
        driver.cache.sequence(PROMPT, "tiny")


def test_retired_namespace(driver):
    old = driver.cache.new_namespace(model="tiny", weights_version="1")
    driver.cache.retire_namespace(old)
    with pytest.raises(ValueError, match="was retired"):
        driver.cache.sequence(PROMPT, old)


@pytest.mark.parametrize("fields", [{"model": 3}, {"model": None}, {"model": b"tiny"}], ids=repr)
def test_namespace_field_that_is_no_text(driver, fields):
    with pytest.raises(TypeError, match="namespace field 'model' must be a str"):
        driver.cache.new_namespace(**fields)


@pytest.mark.parametrize("call", ["match", "prefetch", "explain", "admit"])
def test_sequence_of_another_cache(driver, other, call):
    more = (1,) if call == "admit" else ()
    with pytest.raises(ValueError, match="belongs to another cache"):
        getattr(driver.cache, call)(other.sequence(PROMPT), *more)
    with pytest.raises(TypeError, match="a Sequence is needed"):
        getattr(driver.cache, call)(PROMPT, *more)


# ---- leases and tickets


@pytest.mark.parametrize("num_new_tokens", [0, -1])
def test_admit_of_no_new_token(driver, num_new_tokens):
    with pytest.raises(ValueError, match=f"{num_new_tokens=} must be at least 1"):
        driver.cache.admit(driver.sequence(PROMPT), num_new_tokens)


def test_admit_with_a_negative_cap(driver):
    with pytest.raises(ValueError, match="max_cached_tokens=-1 must be at least 0"):
        driver.cache.admit(driver.sequence(PROMPT), 1, max_cached_tokens=-1)


def test_lease_is_used_up_by_its_release(driver):
    lease = driver.admit(driver.sequence(PROMPT))
    driver.cache.release(lease)
    calls: list[Callable] = [
        lambda: driver.cache.release(lease),
        lambda: driver.cache.grow(lease, 45, 1),
        lambda: driver.cache.insert(lease, 45),
        lambda: driver.cache.tables([lease], 32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="released"):
            call()


def test_lease_of_another_cache(driver, other):
    lease = other.admit(other.sequence(PROMPT))
    calls: list[Callable] = [
        lambda: driver.cache.release(lease),
        lambda: driver.cache.grow(lease, 45, 1),
        lambda: driver.cache.insert(lease, 16),
        lambda: driver.cache.tables([lease], 32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"another cache|released"):
            call()


@pytest.mark.parametrize("num_computed", [43, 46, -1])
def test_insert_of_what_cannot_have_been_computed(driver, num_computed):
    """44 tokens are cached, and there is room for one more."""
    lease = driver.admit(driver.sequence(PROMPT))
    with pytest.raises(ValueError, match=f"{num_computed=} must be .*44"):
        driver.cache.insert(lease, num_computed)
    driver.finish(lease)


def test_insert_beyond_the_sequence(driver):
    lease = driver.admit(driver.sequence(PROMPT))
    assert driver.cache.grow(lease, 45, 1)
    with pytest.raises(ValueError, match=r"call sequence\.extend first"):
        driver.cache.insert(lease, 46)
    driver.cache.release(lease)


def test_table_that_is_too_narrow(driver):
    lease = driver.admit(driver.sequence(PROMPT))
    with pytest.raises(ValueError, match="has 12 pages of 'full', max_pages=11"):
        driver.cache.tables([lease], 11)
    driver.finish(lease)


def test_ticket_of_another_sequence_or_cache(rig, other):
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        sequence = driver.sequence(PROMPT)
        ticket = cache.prefetch(sequence)
        with pytest.raises(ValueError, match="was made for another sequence"):
            cache.admit(driver.sequence(PROMPT), 16, ticket=ticket)
        with pytest.raises(ValueError, match="belongs to another cache"):
            other.cache.cancel(ticket)
        with pytest.raises(TypeError, match="a Ticket is needed, not str"):
            cache.cancel("ticket")
        cache.cancel(ticket)
        cache.cancel(ticket)
        driver.drain()
        driver.ask(PROMPT)
        serves_a_hit(driver)


# ---- pools and plans


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        (None, r"pools must be those of all components, \['full'\], not NoneType"),
        ({}, "not \\[\\]"),
        ([], "not list"),
        ({"window": {"kv": None}}, r"not \['window'\]"),
        ({"full": {}}, r"pools\['full'\] must be its arrays \['kv'\], not \[\]"),
        ({"full": None}, "not NoneType"),
        ({"full": {"kv": None}}, r"pools\['full'\]\['kv'\] must be a jax array, not NoneType"),
    ],
    ids=repr,
)
def test_pools_of_a_wrong_form(driver, pools, message):
    for call in (driver.cache.step, driver.cache.apply, driver.cache.warmup):
        with pytest.raises(ValueError, match=message):
            call(pools)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda kv: np.asarray(kv), "must be a jax array, not ndarray"),
        (lambda kv: kv.astype("float16"), "is float16, but its component declares float32"),
        (lambda kv: kv.astype("int32"), "is int32, but its component declares float32"),
        (lambda kv: kv[:-1], r"has the shape \(47, .*, but this cache has \(48, "),
        (lambda kv: kv[:, :1], "has the shape"),
        (lambda kv: kv.reshape(48, -1), "has the shape"),
        (lambda kv: jax.device_put(kv, jax.devices()[1]), "is sharded as"),
    ],
    ids=["numpy", "dtype", "integers", "pages", "layers", "rank", "device"],
)
def test_arrays_that_are_not_the_pools_of_this_cache(driver, make, message):
    """Each of these would give wrong tokens on a hit, or an error that names nothing."""
    driver.ask(PROMPT)
    good = driver.pools
    wrong = {"full": {"kv": make(good["full"]["kv"])}}
    for call in (driver.cache.step, driver.cache.apply, driver.cache.warmup):
        with pytest.raises(ValueError, match=rf"pools\['full'\]\['kv'\] {message}"):
            call(wrong)
    serves_a_hit(driver)


def test_pools_that_a_later_value_has_replaced(driver):
    """A model step that does not donate leaves the old pools alive; what it computed is only in the new ones."""
    cache, old = driver.cache, driver.pools
    cache.step(old)
    driver.pools = new = jax.tree.map(lambda array: array + 0, old)
    for call in (cache.step, cache.apply):
        assert call(new) is not None
        with pytest.raises(ValueError, match=r"stale pools: a later value of full\.kv was passed before"):
            call(old)


def test_pages_are_inserted_after_the_model_step_that_computes_them(rig):
    """Else what the device held before would be backed up, stored, and found after a restart."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        lease = cache.admit(driver.sequence(PROMPT), len(PROMPT))
        cache.insert(lease, len(PROMPT))
        digest = cache.core.digest
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"lease 1 was published up to 45 tokens by insert, but .* no model"):
                cache.apply(driver.pools)
        assert cache.core.digest == digest
        driver.pools = jax.tree.map(lambda array: array + 0, driver.pools)  # the model step has run
        driver.pools = cache.apply(driver.pools)
        cache.release(lease)


@pytest.mark.parametrize("grow", ["grow", "grow_all"])
def test_a_grow_that_says_what_is_computed_is_no_way_around(rig, grow):
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        lease = cache.admit(driver.sequence(PROMPT), len(PROMPT))
        if grow == "grow":
            assert cache.grow(lease, 44, 1)
        else:
            assert cache.grow_all([lease], [44]) == 1
        cache.insert(lease, 44)
        with pytest.raises(RuntimeError, match="no model step has run"):
            cache.apply(driver.pools)
        cache.release(lease)
        cache.reset()
        driver.pools = cache.apply(driver.pools)


def test_a_refused_grow_all_has_said_nothing(rig):
    """What the leases before the refused one had computed counts as little as the call."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        driver.pools = cache.apply(cache.step(driver.pools))
        lease, released = cache.admit(driver.sequence(PROMPT), len(PROMPT)), cache.admit(driver.sequence(OTHER), 8)
        cache.release(released)
        before = lease.num_computed, lease.num_tokens
        with pytest.raises(ValueError, match="was released already"):
            cache.grow_all([lease, released], [44, 8])
        assert (lease.num_computed, lease.num_tokens) == before
        assert cache.core.leases.uncomputed is None
        assert cache.grow_all([lease], [44]) == 1
        assert cache.core.leases.uncomputed is not None
        cache.release(lease)


def test_more_room_does_not_make_what_is_computed_uncomputed(rig):
    """The model step has run in the version before; asking for the next chunk changes nothing about that."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        lease = cache.admit(driver.sequence(PROMPT), 16)
        driver.pools = cache.step(jax.tree.map(lambda array: array + 0, cache.apply(cache.step(driver.pools))))
        assert cache.grow(lease, 0, 24)
        assert cache.grow_all([lease], [0], 16) == 1
        cache.insert(lease, 16)
        driver.pools = cache.apply(driver.pools)
        cache.release(lease)


def test_pages_that_an_earlier_model_step_has_computed_may_be_inserted_at_any_time(rig):
    """A request that is retracted publishes what it has, though no model step has run since it asked for more room."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        cache.step(driver.pools)
        lease = cache.admit(driver.sequence(PROMPT), len(PROMPT))
        driver.pools = cache.apply(cache.step(jax.tree.map(lambda array: array + 0, driver.pools)))
        assert cache.grow(lease, len(PROMPT), 4)
        cache.insert(lease, len(PROMPT))
        driver.pools = cache.apply(driver.pools)
        lease.sequence.extend([1, 2, 3, 4])
        cache.insert(lease, len(PROMPT) + 4)  # room for these was given after the last model step
        with pytest.raises(RuntimeError, match="no model step has run"):
            cache.apply(driver.pools)


def test_stale_pools(driver):
    """A value that was donated to a model step or a load-back is found out before anything happens."""
    stale = driver.pools
    driver.ask(OTHER)
    for call in (driver.cache.step, driver.cache.apply, driver.cache.warmup):
        with pytest.raises(ValueError, match=r"stale pools: full\.kv was donated"):
            call(stale)


def test_tables_while_a_plan_is_unapplied(driver):
    lease = driver.admit(driver.sequence(OTHER))
    driver.extend(lease, 0, 16, is_decode=False)
    driver.cache.insert(lease, 16)  # plans a backup
    with pytest.raises(RuntimeError, match=r"call pools = cache\.apply"):
        driver.cache.tables([lease], 32)
    with pytest.raises(RuntimeError, match=r"call pools = cache\.apply"):
        _ = lease.page_tables
    driver.pools = driver.cache.apply(driver.pools)
    assert driver.cache.tables([lease, None], 32)["full"].shape == (2, 32)
    driver.cache.release(lease)


def test_tables_before_the_first_step(driver):
    """Its load-back is on the way. Nor does a step begin before the load-back is applied."""
    driver.fill_device()
    lease = driver.cache.admit(driver.sequence(PROMPT), 1)
    assert lease.host_tokens == 44
    with pytest.raises(RuntimeError, match=f"may run from step {driver.cache.step_number + 1} on"):
        driver.cache.tables([lease], 32)
    with pytest.raises(RuntimeError, match="a load-back was planned but not applied"):
        driver.cache.step(driver.pools)
    driver.pools = driver.cache.apply(driver.pools)
    with pytest.raises(RuntimeError, match="may run from step"):
        driver.cache.tables([lease], 32)
    driver.pools = driver.cache.step(driver.pools)
    with pytest.raises(RuntimeError, match=r"call pools = cache\.apply"):
        driver.cache.tables([lease], 32)
    driver.pools = driver.cache.apply(driver.pools)
    check_equal(driver.finish(lease), reference(driver.rig.mesh, tuple(PROMPT.tolist())))


def test_forgetting_everything_while_a_lease_is_out(driver):
    lease = driver.admit(driver.sequence(PROMPT))
    with pytest.raises(RuntimeError, match="reset needs every lease released first"):
        driver.cache.reset()
    driver.finish(lease)


# ---- what a cache is made of


def full(slots: int = PAGE_TOKENS, heads: int = 2, name: str = "full") -> FullAttention:
    axes = ("layers", None, "slots", "heads", None)
    return FullAttention(name, (FieldSpec("kv", (3, 2, slots, heads, 8), "float32", axes),))


@pytest.mark.parametrize(
    ("component", "shape", "message"),
    [
        (full(slots=5), (2, 1, 1), "5 slots do not divide over cp=2"),
        (full(heads=3), (1, 2, 1), "3 heads do not divide over tp=2"),
        (full(heads=2), (1, 3, 1), "2 heads do not divide over tp=3"),
    ],
    ids=["slots", "heads", "fewer heads"],
)
def test_pages_that_do_not_divide_over_the_mesh(make_mesh, component, shape, message):
    config = jaxcache.CacheConfig(page_tokens=component.fields[0].shape[2], device_pages=8)
    with pytest.raises(ValueError, match=message):
        jaxcache.Cache((component,), make_mesh(*shape), config)


@pytest.mark.parametrize(
    ("components", "changes", "message"),
    [
        ((), {}, "components with different names"),
        ((full(), full()), {}, "components with different names"),
        ((full(), full(name="more")), {}, "declare one component with several fields"),
        ((full(),), {"device_pages": 0}, "needs an int of at least 1 pages, not 0"),
        ((full(),), {"device_pages": {"window": 8}}, "full"),
        ((full(),), {"host_pages": {"full": 8, "window": 8}}, "window"),
        ((full(),), {"host_pages": -1}, "at least 0 pages"),
        ((full(),), {"eviction_policy": "fastest"}, "fastest"),
    ],
    ids=lambda value: "",
)
def test_components_and_tiers_that_make_no_cache(make_mesh, components, changes, message):
    config = jaxcache.CacheConfig(**{"page_tokens": PAGE_TOKENS, "device_pages": 8, **changes})
    with pytest.raises(ValueError, match=message):
        jaxcache.Cache(components, make_mesh(), config)


def test_mesh_without_our_axes():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="must be the axes"):
        jaxcache.Cache((full(),), mesh, jaxcache.CacheConfig(page_tokens=PAGE_TOKENS, device_pages=8))


def test_no_second_pools_while_the_device_tier_holds_anything(driver):
    """They would be zeros, and hits would read them."""
    with pytest.raises(RuntimeError, match=r"call forget_device\(\) first"):
        driver.cache.init_pools()


def test_pools_that_do_not_fit(other, monkeypatch):
    """CPU devices do not say how much memory they have, so these are made up."""
    page_bytes = 3 * 2 * PAGE_TOKENS * 2 * 8 * 4
    memory = {"bytes_limit": 50_000, "bytes_in_use": 20_000}
    small = SimpleNamespace(memory_stats=lambda: memory)
    with monkeypatch.context() as patched:
        patched.setattr(device_pool, "local_devices", lambda mesh: (small,))
        with pytest.raises(MemoryError, match=f"pools of {DEVICE_PAGES * page_bytes} bytes .* 30000 free bytes"):
            other.cache.init_pools()
        memory["bytes_limit"] = 20_000 + DEVICE_PAGES * page_bytes
        other.cache.init_pools()


@pytest.mark.parametrize("max_transfer_pages", [1, 6, 1000])
def test_transfers_need_no_power_of_two(rig, max_transfer_pages):
    """Longer transfers are cut, and nothing compiles after the warm-up."""
    with rig.cache(max_transfer_pages=max_transfer_pages) as cache:
        driver = Driver(rig, cache)
        driver.pools = cache.warmup(driver.pools)
        compiled = jaxcache.compile_count()
        for _ in range(2):
            got = driver.ask(PROMPT)
            driver.fill_device()
        assert jaxcache.compile_count() == compiled
    assert got.hits == (0, 44, 0)
    check_equal(got, reference(rig.mesh, tuple(PROMPT.tolist())))


# ---- interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_a_call_that_is_interrupted_ends_serving(rig, monkeypatch, error):
    """The tree may be half changed, and would give wrong pages: every later call says why there are none."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        sequence = driver.sequence(PROMPT)
        lease = driver.admit(sequence)

        def fails(*_):
            raise error("in the middle")

        with monkeypatch.context() as patched:
            patched.setattr(cache.core.tiers.tree, "split", fails)
            patched.setattr(cache.core.tiers.tree, "add", fails)
            with pytest.raises(error, match="in the middle"):
                cache.insert(lease, 16)
        calls: list[Callable] = [
            lambda: cache.step(driver.pools),
            lambda: cache.apply(driver.pools),
            lambda: cache.wait(driver.pools),
            lambda: cache.tables([lease], 32),
            lambda: cache.admit(sequence, 16),
            lambda: cache.grow(lease, 0, 1),
            lambda: cache.grow_all([lease], [0]),
            lambda: cache.insert(lease, 0),
            lambda: cache.release(lease),
            lambda: cache.prefetch(sequence),
            lambda: cache.new_namespace(model="other"),
            lambda: cache.retire_namespace(driver.namespace),
            lambda: cache.set_policies(),
            lambda: cache.detach_storage(),
            lambda: cache.clear_storage(),
            lambda: cache.reset(),
            lambda: cache.forget_device(),
            lambda: cache.drain(driver.pools),
        ]
        for call in calls:
            with pytest.raises(jaxcache.ServingEnded, match="insert was interrupted by") as ended:
                call()
            assert type(ended.value.__cause__) is error


def test_an_interrupt_after_a_donation_ends_serving(rig, monkeypatch):
    """The pools that were given are gone, and the new ones are known to nobody."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with rig.cache() as cache:
        pools = cache.step(cache.init_pools())
        monkeypatch.setattr(cache._pools_check, "handed_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.apply(pools)
        with pytest.raises(jaxcache.ServingEnded, match="_apply was interrupted by KeyboardInterrupt"):
            cache.step(pools)


# ---- closed


def test_closed_cache(rig):
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        sequence = driver.sequence(PROMPT)
    cache.close()
    calls: list[Callable] = [
        lambda: cache.step(driver.pools),
        lambda: cache.apply(driver.pools),
        lambda: cache.admit(sequence, 16),
        lambda: cache.drain(driver.pools),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the cache is closed"):
            call()


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_outlives_its_cache(rig, fails):
    before = set(threading.enumerate())
    try:
        with rig.cache(jaxcache.MemoryStorage()) as cache:
            driver = Driver(rig, cache)
            driver.ask(PROMPT)
            driver.step()
            assert any(thread.name.startswith("jaxcache") for thread in threading.enumerate())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert {t.name for t in set(threading.enumerate()) - before if t.name.startswith("jaxcache")} == set()


# ---- numbers and lists of any kind


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), 10**30, np.float32(4), [4], np.array([4, 8]), "4", b"4", 4.5],
    ids=lambda value: type(value).__name__,
)
def test_numbers_that_are_none_end_nothing(driver, value):
    """Neither serving nor the message that says so."""
    cache = driver.cache
    lease = driver.admit(driver.sequence(OTHER))
    sequence = driver.sequence(PROMPT)
    digest = cache.core.digest
    for call in (
        lambda: cache.admit(sequence, value),
        lambda: cache.admit(sequence, 4, max_cached_tokens=value) if not isinstance(value, int) or value < 0 else 1 / 0,
        lambda: cache.match(sequence, value) if not isinstance(value, int) or value < 0 else 1 / 0,
        lambda: cache.grow(lease, value, 1),
        lambda: cache.grow(lease, 0, value),
        lambda: cache.grow_all([lease], [value]),
        lambda: cache.grow_all([lease], [0], value),
        lambda: cache.grow_all(value, value),
        lambda: cache.insert(lease, value),
        lambda: cache.insert(lease, 0, states=value),
        lambda: cache.insert(lease, 0, priority=value),
        lambda: cache.insert(lease, 0, retain_steps=value),
        lambda: cache.tables([lease], value),
        lambda: cache.tables(value, 4),
        lambda: cache.set_policies(write_policy=value),
        lambda: cache.drain(driver.pools, timeout_s=value) if not isinstance(value, float | int) else 1 / 0,
    ):
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
            call()
        assert cache.core.serving.ended is None and cache.core.digest == digest
    driver.finish(lease)


def test_limits_of_a_match_are_ints(driver):
    """A number of numpy's that was kept would overflow, or be found unequal, later on."""
    sequence = driver.sequence(PROMPT)
    assert driver.cache.match(sequence, np.uint8(44)).num_tokens == 44  # pyright: ignore[reportArgumentType]
    lease = driver.cache.admit(sequence, 4, max_cached_tokens=44)
    assert type(lease.num_cached_tokens) is int and lease.num_cached_tokens == 44
    driver.cache.release(lease)


def test_grow_all_refuses_before_anything_changes(driver):
    lease = driver.admit(driver.sequence(OTHER))
    for leases, computed in (([lease, None], [4, 4]), ([lease, lease], [4, -1])):
        with pytest.raises((ValueError, TypeError)):
            driver.cache.grow_all(leases, computed)
        assert lease.num_computed == 0
    driver.finish(lease)
