"""Backup and load-back on one GPU beside pinned copies of as many contiguous bytes, and what they cost a running step.

backup      gather of scattered pages, and their way into pinned host rows
load-back   host rows to the device, and the scatter into the pool
of_pinned   a pinned copy's time (jax.device_put, whole array) / this one's; medians of alternating turns
products    steps of matrix products, passes: steps that read and write memory; ratio: with copies in each / without;
            ahead: in a loop that dispatches a step while the one before it runs
to_stacked  the time of a pool that is a list of layers / that of one array with pages of as many bytes
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.timing import seconds
from jaxcache.components import FieldSpec, FullAttention
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.pools.device_pool import init_pools
from jaxcache.pools.page_layout import page_layouts
from jaxcache.types import Move, Transfer, TransferKind

PAGE_KIB = (64, 256, 1024, 4096)
LARGE_KIB, LARGE_BYTES = 1024, 256 << 20
LIST_LAYERS = 64
REPEATS, WARMUPS = 12, 3
TURNS, TURN_STEPS = 5, 6  # the first step of a turn does not count: nothing is to be scattered in it
Figures = dict[str, float]


class Copies:
    """One component on one device: pools of twice as many pages as are moved. Compiled when it is used first.

    num_fields: of a page, all alike, as where a pool is a list of layers
    """

    def __init__(self, page_bytes: int, num_moved: int, num_fields: int = 1):
        device = jax.devices()[0]
        axis_types = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh((1, 1, 1), ("cp", "tp", "pp"), axis_types=axis_types, devices=[device])
        shape = (page_bytes // num_fields // 4 // 128, 128)
        specs = tuple(FieldSpec(f"kv{i}", shape, "int32", ("slots", None)) for i in range(num_fields))
        layouts = page_layouts([FullAttention("full", specs)], mesh)
        pages = {"full": 2 * num_moved}
        effects = DeviceEffects(layouts, mesh, pages, pages, num_moved)
        self.engine = TransferEngine(effects, effects.parts({}), None, deadline_s=60, num_threads=4)
        self.pools = init_pools(layouts, pages, mesh)
        order = np.random.default_rng(0).permutation(2 * num_moved).astype(np.int32)
        self.device_ids, self.host_ids = order[:num_moved], order[num_moved:]
        self.num_bytes = num_moved * page_bytes
        self.pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
        self.on_device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self.flat = jnp.ones(self.num_bytes // 4, jnp.int32)
        self.flat_host = jax.block_until_ready(jax.device_put(self.flat, self.pinned))
        self.step = 0

    def apply(self, *kinds: TransferKind) -> None:
        moves = {
            TransferKind.BACKUP: Move("full", self.device_ids, self.host_ids),
            TransferKind.LOAD_BACK: Move("full", self.host_ids, self.device_ids),
        }
        self.step += 1
        transfers = [Transfer(2 * self.step + i, kind, self.step, (moves[kind],)) for i, kind in enumerate(kinds)]
        self.pools = self.engine.apply(self.pools, transfers, self.step)

    def backup(self) -> None:
        self.apply(TransferKind.BACKUP)
        self.engine.drain()

    def load_back(self) -> None:
        self.apply(TransferKind.LOAD_BACK)
        self.apply()
        jax.block_until_ready(self.pools)

    def pinned_down(self) -> None:
        jax.block_until_ready(jax.device_put(self.flat, self.pinned))

    def pinned_up(self) -> None:
        jax.block_until_ready(jax.device_put(self.flat_host, self.on_device))


def run(is_gpu: bool) -> Iterator[tuple[str, Figures]]:
    """(name, figures) of one setting after the other."""
    total = 64 << 20 if is_gpu else 2 << 20
    for page_kib in PAGE_KIB if is_gpu else PAGE_KIB[:2]:
        yield f"host_copies_{page_kib}_kib", host_copies(page_kib << 10, total)
    if is_gpu:
        yield f"large_host_copies_{LARGE_KIB}_kib", host_copies(LARGE_KIB << 10, LARGE_BYTES)
    part_kib, num_pages = (32, 32) if is_gpu else (4, 4)
    yield f"list_of_{LIST_LAYERS}_layers", list_copies(part_kib << 10, num_pages)
    yield "steps_while_copying", steps_while_copying(is_gpu)
    yield "small_reads", small_reads()


def host_copies(page_bytes: int, total: int) -> Figures:
    copies = Copies(page_bytes, total // page_bytes)
    actions = (copies.pinned_down, copies.backup, copies.pinned_up, copies.load_back)
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    down, backup, up, load_back = (statistics.median(times) for times in zip(*rounds, strict=True))
    dispatch_s = statistics.median(_dispatch_s(copies) for _ in range(REPEATS))
    copies.engine.close()
    return {
        "mib": total >> 20,
        "pinned_down_gb_per_s": total / down / 1e9,
        "pinned_up_gb_per_s": total / up / 1e9,
        "backup_gb_per_s": total / backup / 1e9,
        "load_back_gb_per_s": total / load_back / 1e9,
        "backup_of_pinned": down / backup,
        "load_back_of_pinned": up / load_back,
        "dispatch_us": dispatch_s * 1e6,
    }


def list_copies(part_bytes: int, num_pages: int) -> Figures:
    """Pages of as many bytes, one array a layer and all in one."""
    listed, stacked = (Copies(LIST_LAYERS * part_bytes, num_pages, n) for n in (LIST_LAYERS, 1))
    actions = (listed.backup, listed.load_back, stacked.backup, stacked.load_back)
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    backup, load_back, stacked_backup, stacked_load_back = (statistics.median(t) for t in zip(*rounds, strict=True))
    listed.engine.close()
    stacked.engine.close()
    total = num_pages * LIST_LAYERS * part_bytes
    return {
        "list_mib": total >> 20,
        "list_backup_gb_per_s": total / backup / 1e9,
        "list_load_back_gb_per_s": total / load_back / 1e9,
        "list_backup_to_stacked": backup / stacked_backup,
        "list_load_back_to_stacked": load_back / stacked_load_back,
    }


def _dispatch_s(copies: Copies) -> float:
    """What one backup takes of the serving thread."""
    took = seconds(lambda: copies.apply(TransferKind.BACKUP))
    copies.engine.drain()
    return took


def steps_while_copying(is_gpu: bool) -> Figures:
    """Steps of two kinds, alone and with copies in each: a backup of 16 MiB, a load-back of 16 MiB, and the scatter
    of the load-back before."""
    size = 4096 if is_gpu else 128
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    memory = jnp.ones((256 << 20) if is_gpu else (1 << 20), jnp.int8)
    scale = jnp.bfloat16(1e-4)
    products = jax.jit(lambda a: jax.lax.fori_loop(0, 40, lambda _, a: (a @ a) * scale, a))
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, 24, lambda _, x: x + jnp.int8(1), x))
    copies = Copies(1 << 20 if is_gpu else 1 << 16, 16)
    both = (TransferKind.BACKUP, TransferKind.LOAD_BACK)
    figures: Figures = {}
    for name, program, value in (("products", products, matrix), ("passes", passes, memory)):
        for loop, steps_s in (("", waiting_steps_s), ("_ahead", steps_ahead_s)):
            alone, busy = [], []
            for _ in range(TURNS):  # in turn, so that a clock that changes changes both
                alone += steps_s(copies, program, value, ())
                busy += steps_s(copies, program, value, both)
                copies.engine.drain()
                copies.apply()
                jax.block_until_ready(copies.pools)
            figures[f"{name}{loop}_alone_ms"] = statistics.median(alone) * 1e3
            figures[f"{name}{loop}_ratio"] = statistics.median(busy) / statistics.median(alone)
    copies.engine.close()
    return figures


Program = Callable[[Any], Any]


def waiting_steps_s(copies: Copies, program: Program, value: Any, kinds: tuple[TransferKind, ...]) -> list[float]:
    """A loop that waits for each step, as it must where the host chooses tokens."""

    def step() -> None:
        copies.apply(*kinds)
        jax.block_until_ready(program(value))

    return [seconds(step) for _ in range(TURN_STEPS)][1:]


def steps_ahead_s(copies: Copies, program: Program, value: Any, kinds: tuple[TransferKind, ...]) -> list[float]:
    """A loop that dispatches a step while the one before it runs."""
    running = program(value)

    def step() -> None:
        nonlocal running
        copies.apply(*kinds)
        behind = program(running)
        jax.block_until_ready(running)
        running = behind

    return [seconds(step) for _ in range(TURN_STEPS)][1:]


def small_reads() -> Figures:
    """What the agreement reads in every step: int32[128], its copy asked for at once and read 5 ms later."""
    program, vector = jax.jit(lambda v: v + 1), jnp.zeros(128, jnp.int32)
    jax.block_until_ready(program(vector))
    issue, read = [], []
    for _ in range(20):
        start = time.perf_counter()
        outcome = program(vector)
        outcome.copy_to_host_async()
        issue.append(time.perf_counter() - start)
        time.sleep(0.005)
        read.append(seconds(lambda outcome=outcome: np.asarray(outcome)))
    return {"issue_us": statistics.median(issue) * 1e6, "read_us": statistics.median(read) * 1e6}
