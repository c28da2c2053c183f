"""A serving loop of several processes, in which one goes wrong; run by test_fleet_failures.py.

argv: {"steps", "model": whether there is one, "halts", "corrupts", "faults" or "breaks": a process, "at": a step,
       "early": whether it faults before the exchange, "timeout_s": the bound, "hangs": whether storage never answers,
       "drains": a process whose storage never answers; at the end all drain for "drain_s",
       "starved": a process without memory for its host pool ("of": "host") or its device pools ("device"), which then
       stays as if it waited at its exit,
       "leaves": a process that ends itself for a reason of its own in step "at"}
{"content": a process that is given other content than the others, in one cache after the other}
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcache
from jaxcache import cache as face
from jaxcache.launch import join
from jaxcache.pools import host_pool
from jaxcache.pools.device_pool import DevicePools

KV = jaxcache.FieldSpec("kv", (2, 2, 4, 1, 8), "float32", ("layers", None, "slots", "heads", None))
CONFIG = jaxcache.CacheConfig(page_tokens=4, device_pages=64, host_pages=32, agreement_timeout_s=5.0)
PROMPT = list(range(32))


class HungStorage(jaxcache.MemoryStorage):
    def __init__(self, hangs: bool):
        super().__init__()
        self.hangs = hangs

    def put(self, key, buffer) -> bool:
        if self.hangs:
            threading.Event().wait()
        return super().put(key, buffer)


def mesh_of_all() -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return Mesh(np.array(jax.devices()).reshape(1, 1, -1), ("cp", "tp", "pp"), axis_types=axis_types)


def model_step(mesh: Mesh):
    """() -> an array that is ready when the step is, which needs all ranks."""
    rows = NamedSharding(mesh, PartitionSpec("pp"))
    x = np.ones((mesh.size * 64, 64), np.float32)
    sharded = jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
    local = jax.shard_map(lambda a: jax.lax.psum(a @ a.T @ a, "pp"), mesh=mesh, in_specs=rows.spec, out_specs=rows.spec)
    program = jax.jit(local)
    return lambda: program(sharded)


def serve(cache: jaxcache.Cache, index: int, plan: dict) -> None:
    run, pools = model_step(cache.mesh) if plan["model"] else None, cache.init_pools()
    write_pages = jax.jit(lambda pools: pools, donate_argnums=0)
    namespace = cache.new_namespace(model="test")
    for step in range(plan["steps"]):
        faults = step == plan["at"] and index == plan.get("faults")
        if faults and plan.get("early"):
            cache.engine.fault = OSError("a copy that failed")
        pools = cache.step(pools)
        if step == plan["at"] and index == plan.get("corrupts"):
            (node,) = namespace_root(cache, namespace).children.values()
            namespace_root(cache, namespace).children.clear()
            print(f"lost {node.end} tokens", flush=True)
        if faults:
            cache.engine.fault = OSError("a copy that failed")
        lease = cache.admit(cache.sequence([*PROMPT, step], namespace), num_new_tokens=1)
        pools = cache.apply(pools)
        if step == plan["at"] and index == plan.get("leaves"):
            jaxcache.end_process(LookupError("no such model"))
        if step == plan["at"] and index == plan.get("halts"):
            print("halts", flush=True)
            time.sleep(600)
        if run is not None:
            cache.wait(run())
        pools = write_pages(pools)
        cache.grow(lease, lease.num_cached_tokens, len(PROMPT) + 1 - lease.num_cached_tokens)
        if step == plan["at"] and index == plan.get("breaks"):
            cache.core.leases.insert = break_off
        cache.insert(lease, len(PROMPT) + 1)
        cache.release(lease)
        print(f"finished step {step}", flush=True)
    if "drains" in plan:
        drain(cache, pools, plan["drain_s"])


def break_off(*_) -> None:
    raise OverflowError("in the middle of a call")


def drain(cache: jaxcache.Cache, pools: DevicePools, timeout_s: float) -> None:
    try:
        cache.drain(pools, timeout_s)
    except TimeoutError as error:
        for _ in range(3):
            pools = cache.apply(cache.step(pools))
        print(f"{error} in step {cache.step_number}", flush=True)
        os._exit(0)  # a thread still waits for the storage


def namespace_root(cache: jaxcache.Cache, namespace: jaxcache.Namespace):
    return cache.core.tiers.tree.root(namespace)


def start(index: int) -> None:
    """Caches of processes that disagree about their settings."""
    component, mesh = jaxcache.FullAttention("full", (KV,)), mesh_of_all()
    own = replace(CONFIG, device_pages=64 - 16 * index, host_pages=8 + index)
    with jaxcache.Cache([component], mesh, own) as cache:
        print(cache.device_pages, cache.config.host_pages, cache.init_pools()["full"]["kv"].shape[0], flush=True)
    try:
        jaxcache.Cache([component], mesh, replace(CONFIG, device_pages={"full": 1 - index}))
    except (ValueError, jaxcache.RanksDiverged) as error:
        print(error, flush=True)
    for components, config in (
        ([component], replace(CONFIG, max_states_per_path=4 + index)),
        ([replace(component, name=f"full{index}")], CONFIG),
    ):
        try:
            jaxcache.Cache(components, mesh, config)
        except jaxcache.RanksDiverged as error:
            print(error, flush=True)


def differ(index: int, victim: int) -> None:
    """One cache after the other, in each of which one process gets other content in step 2; prints what is raised."""
    component, mesh = jaxcache.FullAttention("full", (KV,)), mesh_of_all()
    for what in ("prompt", "generated", "namespace", "retired"):
        is_other = index == victim
        with jaxcache.Cache([component], mesh, CONFIG) as cache:
            first, second = (cache.new_namespace(model="test", adapter=name) for name in ("a", "b"))
            pools = cache.init_pools()
            lease = None
            try:
                for step in range(10):
                    pools = cache.apply(cache.step(pools))
                    if step == 2 and what == "namespace":
                        cache.new_namespace(model="test", adapter="d" if is_other else "c")
                    if step == 2 and what == "retired":
                        cache.retire_namespace(second if is_other else first)
                    if step == 2 and what == "prompt":  # long before its last tokens
                        lease = cache.admit(cache.sequence([9 if is_other else 0, *PROMPT], second), len(PROMPT) + 1)
                    if step == 1 and what == "generated":
                        lease = cache.admit(cache.sequence(PROMPT, second), len(PROMPT) + 1)
                    if step == 2 and what == "generated":  # which fills no page
                        lease.sequence.extend([8 if is_other else 7])
                    print(f"{what}: finished step {step}", flush=True)
            except jaxcache.RanksDiverged as error:
                print(f"{what}: {error}".replace("\n", " "), flush=True)


def starve(of: str) -> None:
    """From now on this process has no memory for it."""

    def fails(*args):
        raise MemoryError(f"no room for the {of} pool")

    if of == "host":
        host_pool.plain_memory = fails
    else:
        face.init_pools = fails


def main() -> None:
    index, plan = join(), json.loads(sys.argv[1])
    if "content" in plan:
        return differ(index, plan["content"])
    if "steps" not in plan:
        return start(index)
    config = replace(CONFIG, agreement_timeout_s=plan.get("timeout_s", 5.0))
    hangs = plan.get("hangs") or plan.get("drains") == index
    storage = HungStorage(hangs) if hangs or "drains" in plan else None
    if plan.get("starved") == index:
        starve(plan["of"])
    try:
        with jaxcache.Cache([jaxcache.FullAttention("full", (KV,))], mesh_of_all(), config, storage) as cache:
            serve(cache, index, plan)
    except (jaxcache.ServingEnded, OverflowError) as error:
        jaxcache.end_process(error)
    except MemoryError as error:
        print(f"stays: {error}", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
