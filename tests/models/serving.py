"""What the tests of the whole thing share: one tiny model, one page shape, and step programs compiled once per mesh.

rig_on(mesh)  -> Rig      params and programs of a mesh, for the whole session
Rig.cache()   -> Cache    always the same device pages, because the programs' shapes depend on them
Driver(cache) -> Answer   one request at a time, every call of the loop in the open
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxcache
from models import decoder
from models.families import qwen3
from models.paged_attention import ExtendBatch
from models.serve import BatchShape, Request, Server

SEED = int(os.environ.get("JAXCACHE_TESTS_SEED", "0"))  # of weights and prompts: pytest --seed
PAGE_TOKENS, DEVICE_PAGES, HOST_PAGES = 4, 48, 96
SHAPE = BatchShape(prefill_rows=2, chunk_tokens=16, decode_rows=4, table_pages=32)
MODEL = qwen3.Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=16,
    rope_theta=1e4,
    num_experts=4,
    experts_per_token=2,
)
UNLIMITED = 1 << 30  # tokens
MAX_KL, MAX_ERROR = 1e-6, 1e-4
MESHES = [(1, 1, 1), (2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 1, 1), (1, 2, 1), (1, 1, 2)))]


@dataclass(frozen=True)
class Rig:
    """The tiny model on a mesh. extend: one program per BatchShape."""

    mesh: Mesh
    params: decoder.Params
    extend: Callable
    model: decoder.DecoderConfig = MODEL
    page_tokens: int = PAGE_TOKENS

    def cache(self, storage: jaxcache.Storage | None = None, **changes: Any) -> jaxcache.Cache:
        """A cache of this model's pages; prefetches are waited for, nothing is too short or too slow for them, and
        every page is a value of storage, so that a hit ends where the prompts part."""
        choices = {
            "page_tokens": self.page_tokens,
            "device_pages": DEVICE_PAGES,
            "host_pages": HOST_PAGES,
            "prefetch_policy": jaxcache.PrefetchPolicy.WAIT_COMPLETE,
            "prefetch_min_tokens": self.page_tokens,
            "max_transfer_pages": 8,
            "storage_threads": 2,
            "prefetch_if_faster": False,
            "storage_unit_pages": 1,
            "store_time_share": 1.0,
            "storage_deadline_s": 60.0,
            **changes,
        }
        parts = decoder.components(self.model, choices["page_tokens"], "float32")
        return jaxcache.Cache(parts, self.mesh, jaxcache.CacheConfig(**choices), storage=storage)

    def server(self, cache: jaxcache.Cache) -> Server:
        return Server(cache, self.extend, self.params, cache.new_namespace(model="tiny"), SHAPE)


def rig_on(mesh: Mesh, model: decoder.DecoderConfig = MODEL, page_tokens: int = PAGE_TOKENS) -> Rig:
    return _rig(mesh, model, page_tokens)


@functools.cache
def _rig(mesh: Mesh, model: decoder.DecoderConfig, page_tokens: int) -> Rig:
    params = decoder.init_params(model, mesh, SEED, jnp.float32)
    return Rig(mesh, params, decoder.make_extend(model, mesh, page_tokens), model, page_tokens)


def random_tokens(which: int, num_tokens: int) -> np.ndarray:
    """The same for the same `which` and --seed."""
    return (
        np.random.default_rng((which, SEED) if SEED else which)
        .integers(0, MODEL.vocab_size, num_tokens)
        .astype(np.int32)
    )


@dataclass(frozen=True)
class Answer:
    """logits: f32[1 + decoded, vocab], after the prompt and after every decoded token; hits: cached tokens by tier"""

    logits: np.ndarray
    tokens: list[int]
    hits: tuple[int, int, int]


class WrongAnswer(AssertionError):
    """A hit does not equal its miss."""


def check_equal(got: Answer, want: Answer) -> None:
    """Raises WrongAnswer unless tokens are equal and logits nearly so. (Equal tokens mean that the logits compare.)"""
    if got.tokens != want.tokens:
        raise WrongAnswer(f"{got.tokens=} {want.tokens=}")
    error, divergence = float(np.abs(got.logits - want.logits).max()), kl(want.logits, got.logits)
    if not (error <= MAX_ERROR and divergence <= MAX_KL):
        raise WrongAnswer(f"{error=} {divergence=}")


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """The largest of the rows' Kullback-Leibler divergences."""
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (p_logits, q_logits))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())


def emptied(cache: jaxcache.Cache, namespace: jaxcache.Namespace, pools: decoder.Pools) -> decoder.Pools:
    """Every page that is only cached leaves the device: a request takes them all, then many take all slots of states;
    none computes anything. The pools are zero then: what is read of them later was brought back."""
    pools = cache.apply(cache.step(pools))
    pages = {name: n for name, n in cache.device_pages.items() if name != decoder.STATE}
    num_requests = cache.device_pages.get(decoder.STATE, 0)
    for num_tokens in (min(pages.values()) * cache.config.page_tokens, *[1] * num_requests):
        lease = cache.admit(cache.sequence([1], namespace), num_tokens)
        assert isinstance(lease, jaxcache.Lease), lease
        if num_tokens > 1:
            cache.release(lease)
    for lease in list(cache.core.leases.values()):
        cache.release(lease)
    pools = cache.apply(cache.step(pools))
    assert not any(residency.num_resident for residency in cache.core.tiers.device)
    return jax.tree.map(lambda pool: jax.device_put(np.zeros(pool.shape, pool.dtype), pool.sharding), pools)


def unchanged(batch: ExtendBatch) -> ExtendBatch:
    return batch


@dataclass(eq=False)
class Driver:
    """Serves one request at a time. spoil: a mutation of every batch."""

    rig: Rig
    cache: jaxcache.Cache
    spoil: Callable[[ExtendBatch], ExtendBatch] = unchanged
    pools: decoder.Pools = field(init=False)
    namespace: jaxcache.Namespace = field(init=False)

    def __post_init__(self):
        self.pools = self.cache.init_pools()
        self.namespace = self.cache.new_namespace(model="tiny")

    def sequence(self, tokens: Any) -> jaxcache.Sequence:
        return self.cache.sequence(tokens, self.namespace)

    def step(self) -> None:
        self.pools = self.cache.apply(self.cache.step(self.pools))

    def prefetch(self, sequence: jaxcache.Sequence) -> jaxcache.Ticket:
        """Asks storage and waits for all of it."""
        ticket = self.cache.prefetch(sequence)
        assert ticket is not None
        for _ in range(1000):
            self.step()
            self.cache.engine.drain()
            if ticket.done:
                return ticket
        raise AssertionError(f"{ticket} does not end")

    def admit(self, sequence: jaxcache.Sequence, ticket: jaxcache.Ticket | None = None) -> jaxcache.Lease:
        """A lease that may run now."""
        cached = self.cache.match(sequence).num_tokens
        lease = self.cache.admit(sequence, min(SHAPE.chunk_tokens, sequence.num_tokens - cached), ticket)
        assert isinstance(lease, jaxcache.Lease), lease
        self.pools = self.cache.apply(self.pools)
        while lease.first_step > self.cache.step_number:
            self.step()
        return lease

    def extend(self, lease: jaxcache.Lease, start: int, stop: int, is_decode: bool) -> np.ndarray:
        """Computes tokens [start, stop) of a lease, in the first row; returns the logits of the last one."""
        rows, columns = (SHAPE.decode_rows, 1) if is_decode else (SHAPE.prefill_rows, SHAPE.chunk_tokens)
        assert self.cache.grow(lease, start, stop - start)
        self.pools = self.cache.apply(self.pools)
        tokens, starts, num_new = (np.zeros(shape, np.int32) for shape in ((rows, columns), rows, rows))
        tokens[0, : stop - start], starts[0], num_new[0] = lease.sequence.tokens[start:stop], start, stop - start
        tables = self.cache.tables([lease] + [None] * (rows - 1), SHAPE.table_pages)
        slots = self.cache.state_slots([lease] + [None] * (rows - 1), [stop] * rows)
        last = np.maximum(num_new - 1, 0)[:, None]
        batch = self.spoil(ExtendBatch(tokens, starts, num_new, tables, last, slots))
        logits, self.pools = self.rig.extend(self.rig.params, self.pools, batch)
        return np.asarray(logits)[0, 0]

    def finish(
        self, lease: jaxcache.Lease, num_decode: int = 4, by_chunk: bool = False, by_token: bool = False
    ) -> Answer:
        """Prefills what is missing, decodes greedily, publishes and releases.

        by_chunk: publish after every chunk. by_token: a chunk of one token is computed by the program that decodes.
        """
        hits = (lease.device_tokens, lease.host_tokens, lease.storage_tokens)
        prompt, computed = lease.sequence.num_tokens, lease.num_cached_tokens
        logits = []
        while computed < prompt + num_decode:
            if computed >= prompt:
                lease.sequence.extend([int(logits[-1].argmax())])
            stop = min(computed + SHAPE.chunk_tokens, lease.sequence.num_tokens, lease.next_stop or UNLIMITED)
            is_decode, is_stop = computed >= prompt or (by_token and stop - computed == 1), stop == lease.next_stop
            last = self.extend(lease, computed, stop, is_decode)
            computed = stop
            if computed >= prompt:
                logits.append(last)
            if by_chunk or is_stop:
                self.publish(lease, computed)
        self.publish(lease, computed)
        self.cache.release(lease)
        return Answer(np.stack(logits), lease.sequence.tokens[prompt:].tolist(), hits)

    def publish(self, lease: jaxcache.Lease, computed: int) -> None:
        self.cache.insert(lease, computed, states=[computed] if computed in lease.checkpoints else [])
        self.pools = self.cache.apply(self.pools)

    def ask(self, tokens: Any, **choices: Any) -> Answer:
        """One request from admission to release; what storage may have is not asked for."""
        self.step()
        return self.finish(self.admit(self.sequence(tokens)), **choices)

    def ask_storage(self, tokens: Any, **choices: Any) -> Answer:
        """The same, with a prefetch before."""
        sequence = self.sequence(tokens)
        ticket = self.prefetch(sequence)
        return self.finish(self.admit(sequence, ticket), **choices)

    def fill_device(self) -> None:
        self.pools = emptied(self.cache, self.namespace, self.pools)

    def drain(self) -> None:
        self.pools = self.cache.drain(self.pools)

    def edit_pool(self, edit: Callable[[np.ndarray], None], component: str = "full", field: str = "kv") -> None:
        """Changes a device pool in place, such as [pages, layers, 2, page_tokens, heads, head_dim]."""
        pool = self.pools[component][field]
        pages = np.array(pool)
        edit(pages)
        edited = {**self.pools[component], field: jax.device_put(pages, pool.sharding)}
        self.pools = {**self.pools, component: edited}

    def edit_host(self, edit: Callable[[np.ndarray], None], component: str = "full") -> None:
        """Changes the host rows of every device in place, uint8[pages, row_bytes]."""
        self.cache.engine.drain()
        for rows in self.cache.engine.effects.host_pools[component].rows.values():
            edit(rows)


@functools.cache
def reference(
    mesh: Mesh, prompt: tuple[int, ...], model: decoder.DecoderConfig = MODEL, page_tokens: int = PAGE_TOKENS
) -> Answer:
    """The answer to a prompt without caching, in the same program shapes."""
    rig = rig_on(mesh, model, page_tokens)
    with rig.cache(caching=False, host_pages=0) as cache:
        return Driver(rig, cache).ask(prompt)


# ---- many requests


def conversations() -> list[Request]:
    """30 requests: three shared beginnings, each continued by four users who come back with more; when long requests
    have driven those out, three users come again."""
    return [
        *(ask(user, 17) for user in range(12)),
        *(ask(user, 34) for user in range(12)),
        *(Request(random_tokens(300 + i, 100), 2) for i in range(3)),
        *(ask(user, 34) for user in range(3)),
    ]


def ask(user: int, num_tokens: int) -> Request:
    """What one of twelve users asks: a beginning that four share, and tokens of one's own. Every fourth samples."""
    own = random_tokens(100 + user, 40)[: num_tokens + user % 5]
    prompt = np.concatenate([random_tokens(user % 3, 28), own])
    return Request(prompt, 3 + user % 3, temperature=0.7 * (user % 4 == 3), seed=user)


def serve(server: Server, requests: list[Request]) -> list[list[int]]:
    for request in requests:
        server.submit(request)
    assert sorted(map(id, server.run())) == sorted(map(id, requests))
    return [request.output for request in requests]


@functools.cache
def uncached(mesh: Mesh, make: Callable[[], list[Request]] = conversations) -> list[list[int]]:
    """What the requests of `make` are answered without caching."""
    rig = rig_on(mesh)
    with rig.cache(caching=False, host_pages=0) as cache:
        return serve(rig.server(cache), make())
