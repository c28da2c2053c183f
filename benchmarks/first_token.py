"""Time to first token of one request by where its prompt comes from, on the first device.

recompute  nothing is found: chunks of the prompt, one after the other
device     all but the last page is in the device pools
host       it was backed up, and the device pools were lost
storage    another cache stored it: prefetch, load-back and the last page

model      Qwen3-like with experts (all of them computed), random bfloat16 weights: 1.4e9 parameters on a GPU
of_matmul  floating-point operations of the prefill's weights per second, as a share of what a large matmul does
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxcache
from benchmarks.timing import seconds
from models.decoder import components, make_extend, param_targets
from models.families.qwen3 import Qwen3Config
from models.paged_attention import ExtendBatch
from models.serve import WAIT_S

LARGE = Qwen3Config(
    vocab_size=32_768,
    hidden_size=2048,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    mlp_size=3072,
    rope_theta=1e6,
    num_experts=8,
    experts_per_token=2,
)
SMALL = Qwen3Config(
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=128,
    rope_theta=1e4,
    num_experts=4,
    experts_per_token=2,
)
PROMPT_TOKENS = {True: (8192, 2048, 32_768), False: (256,)}  # what matters most first
CHUNK_TOKENS = {True: 2048, False: 64}
PAGE_TOKENS = {True: 64, False: 16}
MATMUL = {True: 8192, False: 256}
ROUNDS = 3
Figures = dict[str, float]


class Service:
    """One model, its compiled steps, and one request at a time."""

    def __init__(self, is_gpu: bool):
        self.cfg = LARGE if is_gpu else SMALL
        self.chunk, self.page = CHUNK_TOKENS[is_gpu], PAGE_TOKENS[is_gpu]
        self.max_pages = max(PROMPT_TOKENS[is_gpu]) // self.page + 1
        axis_types = (jax.sharding.AxisType.Auto,) * 3
        self.mesh = jax.make_mesh((1, 1, 1), ("cp", "tp", "pp"), axis_types=axis_types, devices=jax.devices()[:1])
        self.params = random_params(self.cfg, self.mesh)
        self.num_params = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        self.extend = make_extend(self.cfg, self.mesh, self.page)
        self.prompts = np.random.default_rng(0)

    def cache(self, storage: jaxcache.Storage | None) -> jaxcache.Cache:
        config = jaxcache.CacheConfig(
            page_tokens=self.page,
            device_pages=2 * self.max_pages,
            host_pages=2 * self.max_pages,
            prefetch_policy=jaxcache.PrefetchPolicy.WAIT_COMPLETE,
            prefetch_min_tokens=self.page,
            prefetch_host_share=1.0,
            prefetch_if_faster=False,
            storage_deadline_s=60.0,
            store_time_share=1.0,
        )
        return jaxcache.Cache(components(self.cfg, self.page, "bfloat16"), self.mesh, config, storage=storage)

    def new_prompt(self, num_tokens: int) -> np.ndarray:
        return self.prompts.integers(0, self.cfg.vocab_size, num_tokens).astype(np.int32)


class Session:
    """A cache that serves."""

    def __init__(self, service: Service, cache: jaxcache.Cache):
        self.service, self.cache = service, cache
        self.pools = cache.warmup(cache.step(cache.init_pools()))
        self.namespace = cache.new_namespace(model="first token")
        for num_columns in (service.chunk, service.page):  # compiles both steps; nothing is written
            self._compute(None, np.zeros(0, np.int32), 0, num_columns)

    def first_token_s(self, prompt: np.ndarray, is_stored: bool = False) -> tuple[float, int]:
        """(seconds from the call to the first token's logits on the host, tokens that were found)."""
        cache, chunk = self.cache, self.service.chunk
        start = time.perf_counter()
        sequence = cache.sequence(prompt, self.namespace)
        ticket = cache.prefetch(sequence) if is_stored else None
        while ticket is not None and not ticket.done:
            self.pools = cache.apply(cache.step(self.pools))
            time.sleep(WAIT_S)  # a loop that spins keeps the interpreter from the threads of storage
        found = cache.match(sequence).num_tokens
        lease = cache.admit(sequence, min(chunk, len(prompt) - found), ticket)
        assert isinstance(lease, jaxcache.Lease), lease
        self.pools = cache.apply(self.pools)
        while lease.first_step > cache.step_number:
            self.pools = cache.apply(cache.step(self.pools))
        computed = lease.num_cached_tokens
        while computed < len(prompt):
            end = min(computed + chunk, len(prompt))
            assert cache.grow(lease, computed, end - computed)
            self.pools = cache.apply(self.pools)
            num_columns = chunk if end - computed > self.service.page else self.service.page
            logits = self._compute(lease, prompt[computed:end], computed, num_columns)
            computed = end
        np.asarray(cache.wait(logits))
        took = time.perf_counter() - start
        cache.insert(lease, computed)
        self.pools = cache.apply(self.pools)
        cache.release(lease)
        return took, lease.num_cached_tokens

    def settle(self) -> None:
        """Until all is backed up and stored."""
        self.pools = self.cache.drain(self.pools)

    def lose_device(self) -> None:
        self.cache.forget_device()
        self.pools = self.cache.init_pools()

    def _compute(self, lease: jaxcache.Lease | None, tokens: np.ndarray, start: int, num_columns: int) -> jax.Array:
        columns = np.zeros((1, num_columns), np.int32)
        columns[0, : len(tokens)] = tokens
        tables = self.cache.tables([lease], self.service.max_pages)
        last = np.array([[max(len(tokens) - 1, 0)]], np.int32)
        batch: tuple = (columns, np.array([start], np.int32), np.array([len(tokens)], np.int32), tables, last)
        logits, self.pools = self.service.extend(self.service.params, self.pools, ExtendBatch(*batch))
        return logits


def random_params(cfg: Qwen3Config, mesh: jax.sharding.Mesh):
    """bfloat16, drawn on the device: small enough that nothing overflows."""
    targets, treedef = jax.tree.flatten(param_targets(cfg, mesh, jnp.bfloat16))

    @partial(jax.jit, out_shardings=[target.sharding for target in targets])
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(targets))
        return [
            jax.random.normal(k, target.shape, jnp.bfloat16) * 0.02 for k, target in zip(keys, targets, strict=True)
        ]

    return jax.tree.unflatten(treedef, draw(jax.random.key(0)))


def matmul_flops_per_s(size: int) -> float:
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: (a @ a) * jnp.bfloat16(1e-3))
    jax.block_until_ready(product(matrix))
    return 2 * size**3 / statistics.median(seconds(lambda: jax.block_until_ready(product(matrix))) for _ in range(10))


def run(is_gpu: bool) -> Iterator[tuple[str, Figures]]:
    """(name, figures) of one length of prompts after the other."""
    service = Service(is_gpu)
    matmul = matmul_flops_per_s(MATMUL[is_gpu])
    for num_tokens in PROMPT_TOKENS[is_gpu]:
        yield f"first_token_{num_tokens}", first_tokens(service, num_tokens, matmul)


def first_tokens(service: Service, num_tokens: int, matmul: float) -> Figures:
    times: dict[str, list[float]] = {name: [] for name in ("recompute", "device", "host", "storage")}
    with tempfile.TemporaryDirectory() as folder:
        prompts = [service.new_prompt(num_tokens) for _ in range(ROUNDS)]
        with service.cache(jaxcache.FileStorage(folder)) as cache:
            session = Session(service, cache)
            session.first_token_s(service.new_prompt(num_tokens))  # the first of all is slower
            for prompt in prompts:
                for name in ("recompute", "device", "host"):
                    took, found = session.first_token_s(prompt)
                    assert (found >= num_tokens - service.page) == (name != "recompute"), f"{name}: {found=}"
                    times[name].append(took)
                    session.settle()
                    if name == "device":
                        session.lose_device()
        with service.cache(jaxcache.FileStorage(folder)) as cache:
            session = Session(service, cache)
            for prompt in prompts:
                took, found = session.first_token_s(prompt, is_stored=True)
                assert found >= num_tokens - service.page, f"storage: {found=}"
                times["storage"].append(took)
    median_s = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "parameters": service.num_params,
        **{f"{name}_ms": took * 1e3 for name, took in median_s.items()},
        "host_speedup": median_s["recompute"] / median_s["host"],
        "storage_speedup": median_s["recompute"] / median_s["storage"],
        "matmul_tflops": matmul / 1e12,
        "of_matmul": 2 * service.num_params * num_tokens / median_s["recompute"] / matmul,
    }
