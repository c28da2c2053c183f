"""Times backup and load-back against numpy's memcpy of the same bytes, in one run: python -m benchmarks.host_copies.

backup     gather dispatched, waited for, copied into host rows
load-back  host rows copied out, handed to the device, scattered into the pool
ratio      (backup + load-back) / (memcpy of the bytes, once for each)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxcache.components import FieldSpec, FullAttention, np_dtype
from jaxcache.pools.device_pool import PageMover, init_pools
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import PageLayout, page_layouts
from jaxcache.runtime.shard_copies import device_shard, local_shards, pages_from_rows, rows_from_pages, to_host

NUM_MOVED = 64
NUM_PAGES = 256
REPEATS = 40
WARMUPS = 3


class Copies:
    """One component on one device, with pages scattered over device and host pools."""

    def __init__(self, row_kib: int, dtype: str):
        spec = FieldSpec("kv", (row_kib * 1024 // np_dtype(dtype).itemsize // 128, 128), dtype, ("layers", None))
        mesh = jax.make_mesh((1, 1, 1), ("cp", "tp", "pp"), (jax.sharding.AxisType.Auto,) * 3)
        self.layouts = page_layouts([FullAttention("full", (spec,))], mesh)
        self.layout: PageLayout = self.layouts["full"]
        self.device = mesh.devices.flat[0]
        self.mover = PageMover(self.layouts, mesh, {"full": NUM_PAGES}, NUM_MOVED)
        self.pool = init_pools(self.layouts, {"full": NUM_PAGES}, mesh)["full"]
        self.rows = HostPool(self.layout, NUM_PAGES, mesh).rows[self.device]
        order = np.random.default_rng(0).permutation(NUM_PAGES).astype(np.int32)
        self.device_ids, self.host_ids = order[:NUM_MOVED], order[-NUM_MOVED:]
        self.gather()
        num_bytes = NUM_MOVED * self.layout.row_bytes
        self.flat = np.zeros(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def memcpy(self) -> None:
        np.copyto(*self.flat)

    def gather(self) -> None:
        self.staging: dict[str, jax.Array] = jax.block_until_ready(
            self.mover.gather("full", self.pool, self.device_ids)
        )

    def to_host(self) -> None:
        shard = to_host(local_shards(self.staging["kv"], (self.device,))[0], self.device)
        rows_from_pages(self.rows, self.host_ids, np.asarray(shard))

    def to_device(self) -> None:
        field = self.layout.fields[0]
        pages = pages_from_rows(self.rows, self.host_ids, NUM_MOVED)
        pages = pages.view(field.dtype).reshape(NUM_MOVED, *field.local_shape)
        shard = device_shard(pages, self.device).block_until_ready()
        shape, sharding = self.staging["kv"].shape, self.layout.shardings()["kv"]
        self.staging = {"kv": jax.make_array_from_single_device_arrays(shape, sharding, [shard])}

    def scatter(self) -> None:
        self.pool = jax.block_until_ready(self.mover.scatter("full", self.pool, self.device_ids, self.staging))

    def backup(self) -> None:
        self.gather()
        self.to_host()

    def load_back(self) -> None:
        self.to_device()
        self.scatter()


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def fastest(actions: tuple[Callable[[], None], ...]) -> list[float]:
    """Seconds of each action at its best; they take turns, so that a noisy neighbour slows all of them."""
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)]
    return [min(times) for times in zip(*rounds[WARMUPS:], strict=True)]


def measure(row_kib: int, dtype: str) -> dict[str, float]:
    """GB/s of each part, and the ratio."""
    copies = Copies(row_kib, dtype)
    gigabytes = NUM_MOVED * row_kib * 1024 / 1e9
    parts = (copies.memcpy, copies.gather, copies.to_host, copies.to_device, copies.scatter)
    result = {part.__name__: gigabytes / s for part, s in zip(parts, fastest(parts), strict=True)}
    memcpy_s, backup_s, load_back_s = fastest((copies.memcpy, copies.backup, copies.load_back))
    result |= {"backup_ratio": backup_s / memcpy_s, "load_back_ratio": load_back_s / memcpy_s}
    return result | {"ratio": (backup_s + load_back_s) / (2 * memcpy_s)}


def run() -> dict[str, dict[str, float]]:
    """Results by "dtype, KiB per page and rank"."""
    return {
        f"{dtype} {row_kib} KiB": measure(row_kib, dtype)
        for dtype in ("float32", "bfloat16")
        for row_kib in (4, 16, 64, 256, 1024)
    }


def main() -> None:
    results = run()
    columns = list(next(iter(results.values())))
    print(f"{NUM_MOVED} pages; GB/s, and ratios of seconds to memcpy's")
    print(f"{'':<18}" + "".join(f"{column:>16}" for column in columns))
    for name, row in results.items():
        print(f"{name:<18}" + "".join(f"{row[column]:>16.2f}" for column in columns))


if __name__ == "__main__":
    main()
