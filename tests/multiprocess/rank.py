"""One process of a fleet of the tests: `python -m tests.multiprocess.rank JOB`. Prints one line of JSON: its result.

    join -> mesh over all processes -> the parts of the job, under the thread guard, everybody at a pace of his own

Every assertion of a part is made in every process.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

import jaxcache
from jaxcache.engine.jobs import JobGraph, Steps
from jaxcache.launch import join
from jaxcache.storage import file
from tests import strict_jax
from tests.models.serving import Driver, Rig, conversations, rig_on, serve
from tests.models.turns import TIERS, check_turns, uncached_turns

MESH_AXES = ("cp", "tp", "pp")
MAX_LAG_S = 0.004
SIGNS = slice(file.HEADER_BYTES + 3, None, 4)  # of the float32 in a value's file


@dataclass(frozen=True)
class Job:
    """What a fleet does.

    shape:   of the mesh
    across:  its axes, the first of which goes across processes
    parts:   names in PARTS, done one after the other on the same storage
    storage: folder of the storage that all share
    grid:    of what is stored there; None: the mesh
    """

    shape: tuple[int, int, int]
    parts: tuple[str, ...]
    storage: str
    across: tuple[str, ...] = MESH_AXES
    grid: tuple[int, int, int] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Fleet:
    """This process's view: a rig, a storage, and a random lag of its own."""

    job: Job
    rig: Rig
    lag: random.Random

    def dawdle(self) -> None:
        if self.lag.random() < 0.5:
            time.sleep(self.lag.random() * MAX_LAG_S)

    def cache(self, **changes: Any) -> jaxcache.Cache:
        return self.rig.cache(jaxcache.FileStorage(self.job.storage), storage_grid=self.job.grid, **changes)


def lag_behind(fleet: Fleet) -> None:
    """From now on every job of the data plane begins late, by as much as this process likes."""
    submit = JobGraph.submit

    def late(graph: JobGraph, steps: Steps, after=()):
        def dawdle_and_work() -> Steps:
            fleet.dawdle()
            return (yield from steps)

        return submit(graph, dawdle_and_work(), after)

    JobGraph.submit = late


# ---- parts


def serve_conversations(fleet: Fleet) -> dict[str, Any]:
    """All conversations through `models.serve`."""
    requests = conversations()
    with fleet.cache() as cache:
        server = fleet.rig.server(cache)
        server.warmup()
        num_compiles, step = jaxcache.compile_count(), server.step

        def late_step():
            fleet.dawdle()
            return step()

        server.step = late_step
        outputs = serve(server, requests)
        num_compiles = jaxcache.compile_count() - num_compiles
        server.pools = cache.drain(server.pools)
        hits = {tier: sum(r.hit_tokens[tier] for r in requests) for tier in TIERS}
        assert isinstance(cache.storage, jaxcache.FileStorage)
        corrupt = cache.storage.stats()["corrupt"]
        return {
            "outputs": outputs,
            "hits": hits,
            "digest": cache.core.digest,
            "num_compiles": num_compiles,
            "corrupt": corrupt,
        }


def r10(fleet: Fleet) -> dict[str, Any]:
    """The conversation that branches, from every tier, is answered as without a cache. Before anything is stored."""
    want = uncached_turns(fleet.rig)
    digests = []
    for tier in TIERS:
        with fleet.cache() if tier == "storage" else fleet.rig.cache() as cache:
            driver = Driver(fleet.rig, cache)
            check_turns(driver, tier, want)
            driver.drain()
            digests.append(cache.core.digest)
    return {"outputs": [answer.tokens for answer in want], "digests": digests}


def save_snapshot(fleet: Fleet) -> dict[str, Any]:
    """All conversations, and then the whole cache to a folder beside the storage."""
    requests = conversations()
    with fleet.rig.cache() as cache:
        server = fleet.rig.server(cache)
        outputs = serve(server, requests)
        server.pools = cache.drain(server.pools)
        fleet.dawdle()
        cache.snapshot(server.pools, snapshot_folder(fleet.job.storage))
        return {"outputs": outputs, "digest": cache.core.digest, "pages": num_resident(cache)}


def restore_snapshot(fleet: Fleet) -> dict[str, Any]:
    """The same conversations, with what an earlier fleet has saved."""
    requests = conversations()
    with fleet.rig.cache() as cache:
        server = fleet.rig.server(cache)
        fleet.dawdle()
        server.pools = cache.restore(snapshot_folder(fleet.job.storage))
        pages = num_resident(cache)
        first = cache.match(cache.sequence(requests[-1].prompt, server.namespace)).num_tokens
        outputs = serve(server, requests)
        return {"outputs": outputs, "digest": cache.core.digest, "pages": pages, "first": first}


def snapshot_folder(storage: str) -> str:
    return f"{storage}-snapshot"


def num_resident(cache: jaxcache.Cache) -> dict[str, int]:
    """Pages of full attention on each tier."""
    return {tier: pages["full"]["resident"] for tier, pages in cache.stats()["pages"].items()}


def refuse_snapshot(fleet: Fleet) -> dict[str, Any]:
    """One process cannot see the folder: it says why, and the others hear it before anything was restored."""
    folder = snapshot_folder(fleet.job.storage)
    with fleet.rig.cache() as cache:
        try:
            cache.restore(folder if jax.process_index() else folder + "-elsewhere")
        except (ValueError, RuntimeError) as error:
            nodes = cache.stats()["nodes"]
            return {"kind": type(error).__name__, "says": "there is no snapshot" in str(error), "nodes": nodes}
    return {}


def spoil_storage(fleet: Fleet) -> dict[str, Any]:
    """One process changes the sign of every number; all wait for it."""
    if jax.process_index() == 0:
        for path in Path(fleet.job.storage, "values").glob("*/*"):
            content = np.fromfile(path, np.uint8)
            content[SIGNS] ^= 0x80
            content.tofile(path)
    multihost_utils.sync_global_devices("spoilt")
    return {}


def believe_storage(fleet: Fleet) -> dict[str, Any]:
    """From now on this process takes any value for good: what the comparison of tokens must notice."""
    file.check = lambda header, key, payload: True
    return {}


SNAPSHOTS = (save_snapshot, restore_snapshot, refuse_snapshot)
PARTS = {part.__name__: part for part in (serve_conversations, r10, spoil_storage, believe_storage, *SNAPSHOTS)}


def mesh_of(job: Job) -> Mesh:
    sizes = dict(zip(MESH_AXES, job.shape, strict=True))
    grid = np.array(jax.devices()).reshape([sizes[axis] for axis in job.across])
    grid = grid.transpose([job.across.index(axis) for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def main(job: Job) -> None:
    index = join()
    strict_jax.configure()
    with jax.thread_guard(True):
        fleet = Fleet(job, rig_on(mesh_of(job)), random.Random(f"lag {index}"))
        lag_behind(fleet)
        results = [PARTS[part](fleet) for part in job.parts]
    print(json.dumps(results))


if __name__ == "__main__":
    read = json.loads(sys.argv[1])
    main(Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}))
