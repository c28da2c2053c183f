"""One process of the fleet that agreement/suite.py measures; process 0 prints what it measured as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.measure import WALL
from jaxcache import launch
from jaxcache.agreement.agreement import Agreement
from jaxcache.agreement.collective import CollectiveReduction, agreement_on
from jaxcache.config import CacheConfig
from jaxcache.types import Outcome

AXES = ("cp", "tp", "pp")
COMPONENTS = ("full", "window", "state")
SHAPES = {2: (2, 1, 1), 8: (2, 2, 2)}  # cp, tp, pp by number of devices
LIVE = range(1, 6)  # storage transfers
WIDTH = 256
HEADROOM = 1.25  # so that a host that becomes a little faster still needs `model_ms`
TIMEOUT_S = 60.0
READS = {0: "read_us", 1: "read_one_us", 5: "read_all_us"}  # by how many of the transfers the processes differ in
TIMES = ("issue_us", *READS.values(), "model_us", "round_us", "local_us")


def main(num_steps: int, warmup_steps: int, model_ms: float) -> dict[str, list[float]]:
    """Microseconds by step."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(SHAPES[jax.device_count()]), AXES)
    max_live = CacheConfig(page_tokens=1, device_pages=1).max_live_transfers
    agreement = agreement_on(mesh, COMPONENTS, max_live, CollectiveReduction)
    here = Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), AXES)
    local = agreement_on(here, COMPONENTS, max_live)
    work = model_step(mesh, model_ms)
    times: dict[str, list[float]] = {name: [] for name in TIMES}
    for step in range(warmup_steps + num_steps):
        if step == warmup_steps:
            for values in times.values():
                values.clear()
        num_differing = tuple(READS)[step % len(READS)]
        timed(times["issue_us"], partial(issue, agreement, step, num_differing))
        timed(times["model_us"], work)
        timed(times[READS[num_differing]], partial(agreement.read, TIMEOUT_S))
        timed(times["round_us"], partial(issue_and_read, agreement, step))
        timed(times["local_us"], partial(issue_and_read, local, step))
    return times


def issue(agreement: Agreement, step: int, num_differing: int = 0) -> None:
    differing = {LIVE[(step + i) % len(LIVE)] for i in range(num_differing)}
    outcomes = {id: outcome(id, jax.process_index() if id in differing else 0) for id in LIVE}
    agreement.issue(step, 12345 + step, outcomes, step, True)


def outcome(id: int, process: int) -> Outcome:
    return Outcome(False, False, dict.fromkeys(COMPONENTS, 10 * id - process))


def issue_and_read(agreement: Agreement, step: int) -> None:
    issue(agreement, step)
    agreement.read(TIMEOUT_S)


def timed(values: list[float], call: Callable[[], Any]) -> None:
    start = WALL()
    call()
    values.append((WALL() - start) / 1000)


def model_step(mesh: Mesh, model_ms: float) -> Callable[[], None]:
    """Matrix products on every device and a sum over all, for at least `model_ms`; the caller waits for the answer."""
    spec = PartitionSpec(mesh.axis_names)

    def products(matrix: jax.Array, num: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, num[0], lambda _, x: jnp.tanh(x @ x), matrix)

    def run(matrices: jax.Array, num: jax.Array) -> jax.Array:
        return jax.lax.psum(products(matrices[0], num)[:1, :1], mesh.axis_names)

    shape = (mesh.size, WIDTH, WIDTH)
    matrices = jax.make_array_from_callback(
        shape, NamedSharding(mesh, spec), lambda index: np.full(shape, 1 / WIDTH, np.float32)[index]
    )
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec()))
    num = np.array(
        [enough_products(jax.jit(products), model_ms)], np.int32
    )  # may differ by process: no exchange inside
    return lambda: jax.block_until_ready(program(matrices, num))


def enough_products(products: Callable[..., jax.Array], model_ms: float) -> int:
    """How many take that long on one device, and more."""
    matrix, num = np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32), 1
    jax.block_until_ready(products(matrix, np.array([num], np.int32)))
    enough_us = HEADROOM * model_ms * 1000
    while min(microseconds(partial(products, matrix, np.array([num], np.int32))) for _ in range(5)) < enough_us:
        num *= 2
    return num


def microseconds(call: Callable[[], jax.Array]) -> float:
    start = WALL()
    jax.block_until_ready(call())
    return (WALL() - start) / 1000


if __name__ == "__main__":
    index = launch.join()
    measured = main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    if index == 0:
        print("\n" + json.dumps(measured))  # what others have printed may not end its line
