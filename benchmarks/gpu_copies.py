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
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks.copies import Copies
from benchmarks.timing import seconds
from jaxcache.types import TransferKind

PAGE_KIB = (64, 256, 1024, 4096)
LARGE_KIB, LARGE_BYTES = 1024, 256 << 20
LIST_LAYERS = 64
REPEATS, WARMUPS = 12, 3
TURNS, TURN_STEPS = 5, 6  # the first step of a turn does not count: nothing is to be scattered in it
Figures = dict[str, float]


class Pinned:
    """As many contiguous bytes, on the device and in pinned memory."""

    def __init__(self, num_bytes: int):
        device = jax.devices()[0]
        self.in_host = SingleDeviceSharding(device, memory_kind="pinned_host")
        self.on_device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self.flat = jnp.ones(num_bytes // 4, jnp.int32)
        self.flat_host = jax.block_until_ready(jax.device_put(self.flat, self.in_host))

    def down(self) -> None:
        jax.block_until_ready(jax.device_put(self.flat, self.in_host))

    def up(self) -> None:
        jax.block_until_ready(jax.device_put(self.flat_host, self.on_device))


def one_device() -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("cp", "tp", "pp"), axis_types=axis_types, devices=jax.devices()[:1])


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
    copies, pinned = Copies(one_device(), page_bytes, total // page_bytes), Pinned(total)
    actions = (pinned.down, copies.backup, pinned.up, copies.load_back)
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
    listed, stacked = (Copies(one_device(), LIST_LAYERS * part_bytes, num_pages, n) for n in (LIST_LAYERS, 1))
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
    copies = Copies(one_device(), 1 << 20 if is_gpu else 1 << 16, 16)
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
