"""The serving loop and the demo: whatever is evicted, loaded back, fetched or retracted, tokens stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.components import FieldSpec, RecurrentState
from jaxcache.replay.traces import read_trace
from models import trace_demo
from models.serve import Request, Server, sample
from tests.models.families import FAMILIES
from tests.models.serving import (
    MESHES,
    MODEL,
    SHAPE,
    Rig,
    conversations,
    emptied,
    random_tokens,
    rig_on,
    serve,
    uncached,
)

USUAL_POLICIES = (jaxcache.WritePolicy.WRITE_THROUGH, jaxcache.WritePolicy.WRITE_BACK)
SMALL_HOST = 64  # pages: less than the requests make


@pytest.fixture(params=MESHES, ids=str)
def rig(request: pytest.FixtureRequest, make_mesh) -> Rig:
    return rig_on(make_mesh(*request.param))


@pytest.fixture
def one(make_mesh) -> Rig:
    """One device."""
    return rig_on(make_mesh())


def one_device(rig: Rig) -> bool:
    """There a page is one file of a storage, elsewhere eight."""
    return rig.mesh.size == 1


def long_requests() -> list[Request]:
    """Short prompts and long outputs: each is admitted easily, together they do not fit."""
    return [Request(random_tokens(200 + i, 24), 64) for i in range(5)]


def hits(requests: list[Request]) -> Counter[str]:
    return sum((Counter(request.hit_tokens) for request in requests), Counter())


# ---- tokens


def cases() -> Iterator:
    """Every policy on one device, the two that differ most on eight; everything else is slow."""
    for shape in ((1, 1, 1), (2, 2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for policy in jaxcache.WritePolicy:
            usual = policy in USUAL_POLICIES and shape == (2, 2, 2)
            marks = () if usual or shape == (1, 1, 1) else pytest.mark.slow
            yield pytest.param(shape, policy, marks=marks, id=f"{shape}-{policy.value}")


@pytest.mark.parametrize(("rig", "policy"), list(cases()), indirect=["rig"])
def test_tokens_equal_those_without_a_cache(rig, policy):
    """Under every write policy, with tiers that are too small for what is served."""
    requests = conversations()
    with rig.cache(jaxcache.MemoryStorage(), write_policy=policy, host_pages=SMALL_HOST) as cache:
        server = rig.server(cache)
        assert serve(server, requests) == uncached(rig.mesh)
        server.pools = cache.drain(server.pools)
        stats = cache.stats()
    assert stats["pages"]["device"]["full"]["evicted"] > 0
    assert stats["hit_tokens"]["device"] > 0
    moved = [stats["counters"].get(name, 0) for name in ("backup_pages", "load_back_pages", "stored_pages")]
    if policy is jaxcache.WritePolicy.NONE:
        assert moved == [0, 0, 0]
        assert stats["hit_tokens"]["host"] == stats["hit_tokens"]["storage"] == 0
    else:
        assert min(moved) > 0
        assert stats["hit_tokens"]["host"] > 0


@pytest.mark.parametrize("policy", list(jaxcache.PrefetchPolicy), ids=lambda policy: policy.value)
def test_tokens_equal_after_a_restart(rig, policy, tmp_path):
    """A new cache on the same storage, in whose small host tier fetched pages are evicted and fetched again."""
    storage = jaxcache.FileStorage(tmp_path / "storage") if one_device(rig) else jaxcache.MemoryStorage()
    with rig.cache(storage, prefetch_policy=policy) as cache:
        server = rig.server(cache)
        serve(server, conversations())
        server.pools = cache.drain(server.pools)
        assert cache.stats()["counters"]["stored_pages"] > 0
    requests = conversations()
    if one_device(rig):
        storage = jaxcache.FileStorage(tmp_path / "storage")
    with rig.cache(storage, prefetch_policy=policy, host_pages=SMALL_HOST) as cache:
        assert serve(rig.server(cache), requests) == uncached(rig.mesh)
        stats = cache.stats()
    assert stats["pages"]["host"]["full"]["evicted"] > 0
    assert stats["transfers"]["fetch_pages"] > 0
    if policy is jaxcache.PrefetchPolicy.WAIT_COMPLETE:
        assert hits(requests)["storage"] > 0
        assert stats["counters"]["storage_tokens_used"] == stats["hit_tokens"]["storage"] == hits(requests)["storage"]


def test_every_agreed_storage_token_is_counted_once(one):
    """I12, on a real run."""
    storage = jaxcache.MemoryStorage()
    for _ in range(2):
        with one.cache(storage, host_pages=SMALL_HOST, prefetch_policy=jaxcache.PrefetchPolicy.BEST_EFFORT) as cache:
            server = one.server(cache)
            serve(server, conversations())
            server.pools = cache.drain(server.pools)
            counters = cache.stats()["counters"]
    unfulfilled = sum(n for name, n in counters.items() if name.startswith("unfulfilled_"))
    assert counters["agreed_storage_tokens"] == counters.get("storage_tokens_used", 0) + unfulfilled > 0


def test_trace_is_served_with_equal_tokens(one):
    """Lines of the bundled trace, shortened."""
    lines = read_trace(trace_demo.TRACE, 12)

    def requests() -> list[Request]:
        prompts = [line.prompt(2, MODEL.vocab_size)[:100] for line in lines]
        return [Request(prompt, 1 + line.output_length % 5) for prompt, line in zip(prompts, lines, strict=True)]

    with one.cache() as cache:
        assert serve(one.server(cache), requests()) == uncached(one.mesh, requests)


def test_outputs_differ_between_requests(one):
    """Else equal tokens would prove little."""
    outputs = uncached(one.mesh)
    assert len({tuple(output) for output in outputs}) > 12
    assert len({token for output in outputs for token in output}) > 20


# ---- mutations


@pytest.mark.mutation
@pytest.mark.parametrize("tier", ["device", "host"])
def test_corrupting_one_page_that_is_hit_changes_the_tokens(rig, tier):
    """A shared beginning is spoilt in one page; whoever hits it answers otherwise, and the comparison says so."""
    first, later = conversations()[:12], conversations()[12:24]
    with rig.cache() as cache:
        server = rig.server(cache)
        serve(server, first)
        if tier == "host":
            server.pools = emptied(server.cache, server.namespace, server.pools)
        sequence = cache.sequence(random_tokens(0, 28), server.namespace)
        (node, _), *_ = cache.core.tiers.tree.walk(sequence, 28)
        corrupt(server, tier, int(node.pages[tier == "host"][0]))
        outputs = serve(server, later)
        assert hits(later)[tier] > 0
    want = uncached(rig.mesh)[12:24]
    assert outputs != want
    runs = [
        trace_demo.Run(
            [replace(r, output=output) for r, output in zip(later, o, strict=True)], 1.0, {"counters": {}}, 0
        )
        for o in (want, outputs, want)
    ]
    figures = trace_demo.compare_runs(*runs)
    assert not figures["tokens_identical"]
    assert figures["restart"]["tokens_identical"]


def corrupt(server: Server, tier: str, page: int) -> None:
    """Other finite numbers in one page."""
    if tier == "host":
        server.cache.engine.drain()
        for rows in server.cache.engine.effects.host_pools["full"].rows.values():
            rows[page] ^= 0x80
        return
    kv = server.pools["full"]["kv"]
    pages = np.array(kv)
    pages[page] = 1 - 2 * pages[page]
    server.pools = {"full": {"kv": jax.device_put(pages, kv.sharding)}}


# ---- no room


@pytest.mark.parametrize("policy", USUAL_POLICIES, ids=lambda policy: policy.value)
def test_retracted_requests_answer_the_same(rig, policy):
    """Four requests run whose outputs together do not fit the device."""
    requests = long_requests()
    with rig.cache(write_policy=policy) as cache:
        outputs = serve(rig.server(cache), requests)
        stats = cache.stats()
    assert sum(request.num_retractions for request in requests) > 0
    assert stats["leases"] == 0
    assert outputs == uncached(rig.mesh, long_requests)


def test_request_longer_than_a_table_is_refused(one):
    with one.cache() as cache:
        server = one.server(cache)
        with pytest.raises(ValueError, match=r"100 \+ 29 tokens exceed a table's 128"):
            server.submit(Request(random_tokens(0, 100), 29))
        server.submit(Request(random_tokens(0, 100), 28))
        (request,) = server.run()
    assert len(request.output) == 28


@pytest.mark.parametrize("num_pages", [3, 10], ids=["no chunk fits", "its output does not fit"])
def test_request_larger_than_the_device_raises(one, num_pages):
    """It does not wait for ever: a chunk of 16 tokens takes 4 pages, and 20 + 40 tokens take 15."""
    with one.cache(device_pages=num_pages, host_pages=0) as cache:
        server = one.server(cache)
        server.submit(Request(random_tokens(0, 20), 40))
        steps = (server.step() for _ in range(200))
        with pytest.raises(
            MemoryError, match=f"tokens does not fit the device tier: .*{num_pages}.* pages of 4 tokens"
        ):
            list(steps)


def test_pages_that_only_earlier_tables_name_make_room(make_mesh):
    """A prompt whose window is gone computes again what full attention has: its own pages of that are held for the loop
    until it asks for new tables, and there is no room for both and the rest."""
    rig = rig_on(make_mesh(), FAMILIES["gemma3_wide"])
    with rig.cache(device_pages=14, host_pages=0) as cache:
        server = rig.server(cache)
        for prompt in (random_tokens(0, 44), np.concatenate([random_tokens(0, 44)[:36], random_tokens(1, 11)])):
            request = Request(prompt, 2)
            serve(server, [request])
            assert request.num_retractions == 0
        assert cache.stats()["counters"]["duplicate_pages"] > 0


def test_chunks_of_one_token(one):
    """A prefill is one because of its request, not because of its chunks."""
    shape = replace(SHAPE, chunk_tokens=1)
    with one.cache() as cache:
        server = Server(cache, one.extend, one.params, cache.new_namespace(model="tiny"), shape)
        by_token = serve(server, [Request(random_tokens(5, 9), 4)])
    with one.cache() as cache:
        assert serve(one.server(cache), [Request(random_tokens(5, 9), 4)]) == by_token


# ---- recurrent states


def test_states_are_read_and_kept_where_the_slots_say(one):
    """Chunks end where a state is kept. This state is the number of tokens that it has seen."""
    with one.cache() as plain:
        state = RecurrentState("state", (FieldSpec("h", (1, 4), "float32", ("layers", None)),), chunk_tokens=8)
        cache = jaxcache.Cache((*plain.core.components, state), one.mesh, plain.config)

    ends: list[int] = []

    def extend(params, pools, batch):
        h = np.array(pools["state"]["h"])
        for row in np.flatnonzero(batch.num_new):
            read, write, keep = (slots[row] for slots in batch.states)
            end = batch.starts[row] + batch.num_new[row]
            assert np.all((h[read] if read < len(h) else 0) == batch.starts[row])
            h[write] = end
            if keep < len(h):
                h[keep] = end
            ends.append(end)
        logits, rest = one.extend(params, {"full": pools["full"]}, batch._replace(states=None))
        return logits, {**rest, "state": {"h": jax.device_put(h, pools["state"]["h"].sharding)}}

    with cache:
        server = Server(cache, extend, one.params, cache.new_namespace(model="tiny"), SHAPE)
        first, again, longer = (Request(random_tokens(5, n), 4) for n in (45, 45, 70))
        assert serve(server, [first]) == serve(server, [again])
        serve(server, [longer])
        assert hits([first]).total() == 0
        assert 40 in ends  # the last multiple of 8 tokens in the prompt
        assert hits([again]) == hits([longer]) == {"device": 40}
        assert "unwritten_states" not in cache.stats()["counters"]


# ---- sampling


def test_sampling_does_not_depend_on_the_batch(one):
    """The same seed answers the same alone and among others; another seed answers otherwise."""
    prompt = random_tokens(1, 30)

    def answers(*requests: Request) -> list[list[int]]:
        with one.cache() as cache:
            return serve(one.server(cache), list(requests))

    hot = Request(prompt, 8, temperature=1.0, seed=7)
    (alone,) = answers(replace(hot, output=[]))
    crowd = [Request(random_tokens(i, 20 + i), 6, temperature=0.5, seed=i) for i in range(5)]
    assert answers(*crowd, replace(hot, output=[]))[-1] == alone
    assert answers(replace(hot, output=[], seed=8)) != [alone]
    assert answers(replace(hot, output=[], temperature=0.0)) == answers(Request(prompt, 8, seed=3))


def test_sample_of_temperature_zero_is_the_argmax(rng):
    for _ in range(10):
        logits = rng.standard_normal(64).astype(np.float32)
        assert sample(logits, 0.0, 1, 2) == logits.argmax()
        assert sample(logits, 1e-6, 1, 2) == logits.argmax()


def test_sample_draws_from_the_softmax():
    """4000 draws: within four standard deviations of what each token should get; flatter when hotter."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for temperature in (1.0, 2.0):
        wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        counts = np.bincount([sample(logits, temperature, seed, 5) for seed in range(4000)], minlength=4)
        assert (np.abs(counts - 4000 * wanted) < 4 * np.sqrt(4000 * wanted * (1 - wanted))).all()


def test_sample_of_another_position_is_another_draw():
    logits = np.zeros(64, np.float32)
    assert len({sample(logits, 1.0, 3, position) for position in range(40)}) > 20


def test_sample_refuses_a_negative_temperature():
    with pytest.raises(ValueError, match=r"temperature=-0\.5 must not be negative"):
        sample(np.zeros(4, np.float32), -0.5, 0, 0)


# ---- nothing compiles


def test_nothing_compiles_after_warmup(rig):
    """Over a run with backups, evictions, load-backs, stores, fetches and retractions."""
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage) as cache:
        server = rig.server(cache)
        serve(server, conversations()[:6])
        server.pools = cache.drain(server.pools)
    with rig.cache(storage, host_pages=SMALL_HOST) as cache:
        server = rig.server(cache)
        server.warmup()
        before = jaxcache.compile_count()
        serve(server, conversations() + long_requests())
        assert jaxcache.compile_count() == before
        server.pools = cache.drain(server.pools)
        transfers = cache.stats()["transfers"]
    assert min(transfers[f"{kind}_pages"] for kind in ("backup", "load_back", "store", "fetch")) > 0
