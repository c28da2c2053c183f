"""Times backup and load-back against numpy's memcpy of the same bytes, in one run: python -m benchmarks host_copies.

backup     scattered pages into host rows, until they are there
load-back  host rows into scattered pages, until the pools are computed
ratio      (backup + load-back) / (memcpy of the bytes, once for each), medians of alternating turns
lists      pools that are lists of 64 arrays, (backup + load-back) / the same of one array with as many bytes a page

Through the transfer engine, on the largest mesh of 1, 2, 4 or 8 devices that the host has: a serving process has many
devices. On CPUs each direction is one copy; what is left is Python's work for each page, and for each part of a list.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

import jax
import numpy as np

from benchmarks.timing import seconds
from jaxcache.components import FieldSpec, FullAttention
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.pools.device_pool import init_pools
from jaxcache.pools.page_layout import page_layouts
from jaxcache.types import Move, Transfer, TransferKind

MESHES = {8: (2, 2, 2), 4: (2, 2, 1), 2: (1, 2, 1), 1: (1, 1, 1)}
NUM_PAGES = 256  # of which a quarter is moved
REPEATS = 30
WARMUPS = 3
GOAL_KIB = 64
LIST_LAYERS, LIST_KIB = 64, (64, 2048, 8192)


class Copies:
    """One component whose page takes `row_kib` KiB on each rank.

    num_layers: arrays that it is a list of; 0: one array
    """

    def __init__(self, row_kib: int, num_layers: int = 0, num_pages: int = NUM_PAGES):
        num_devices = max(n for n in MESHES if n <= len(jax.devices()))
        cp, tp, pp = MESHES[num_devices]
        axis_types = (jax.sharding.AxisType.Auto,) * 3
        devices = jax.devices()[:num_devices]
        mesh = jax.make_mesh((cp, tp, pp), ("cp", "tp", "pp"), axis_types=axis_types, devices=devices)
        floats = row_kib * 1024 // 4 // max(num_layers, 1)
        part = FieldSpec(
            "kv", (pp, 2, 8 * cp, 2 * tp, floats // 32), "float32", ("layers", None, "slots", "heads", None)
        )
        fields = tuple(replace(part, name=f"layer{i}") for i in range(num_layers)) or (part,)
        layouts = page_layouts([FullAttention("full", fields)], mesh)
        pages = {"full": num_pages}
        num_moved = num_pages // 4
        effects = DeviceEffects(layouts, mesh, pages, pages, max_bucket=64)
        self.engine = TransferEngine(effects, effects.parts({}), None, deadline_s=60, num_threads=4)
        self.pools = effects.warmup(init_pools(layouts, pages, mesh))
        self.num_bytes = num_moved * layouts["full"].row_bytes * num_devices
        self.flat = np.zeros(self.num_bytes, np.uint8), np.ones(self.num_bytes, np.uint8)
        order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self.device_ids, self.host_ids = order[:num_moved], order[-num_moved:]
        self.step = 0

    def memcpy(self) -> None:
        np.copyto(*self.flat)

    def backup(self) -> None:
        self._apply(TransferKind.BACKUP, Move("full", self.device_ids, self.host_ids))
        self.engine.drain()

    def load_back(self) -> None:
        self._apply(TransferKind.LOAD_BACK, Move("full", self.host_ids, self.device_ids))
        self.pools = jax.block_until_ready(self.engine.apply(self.pools, (), self.step))

    def _apply(self, kind: TransferKind, move: Move) -> None:
        self.pools = self.engine.apply(self.pools, (Transfer(self.step + 1, kind, self.step, (move,)),), self.step)
        self.step += 1


def measure_list(row_kib: int) -> dict[str, float]:
    """What a list costs, for pages of `row_kib` KiB on each rank."""
    stacked, listed = Copies(row_kib, num_pages=64), Copies(row_kib, LIST_LAYERS, num_pages=64)
    actions = (stacked.backup, stacked.load_back, listed.backup, listed.load_back)
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    of_stacked = [statistics.median(times) for times in zip(*rounds, strict=True)]
    for copies in (stacked, listed):
        copies.engine.close()
    part_kib = row_kib // LIST_LAYERS
    return {f"host_copies_list_of_{LIST_LAYERS}_parts_of_{part_kib}kib": sum(of_stacked[2:]) / sum(of_stacked[:2])}


def measure(row_kib: int) -> dict[str, float]:
    """GB/s and ratios for pages of `row_kib` KiB on each rank."""
    copies = Copies(row_kib)
    actions = (copies.memcpy, copies.backup, copies.load_back)
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    memcpy_s, backup_s, load_back_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    copies.engine.close()
    name = f"host_copies_{row_kib}kib"
    return {
        f"{name}_memcpy_gb_per_s": copies.num_bytes / memcpy_s / 1e9,
        f"{name}_backup_ratio": backup_s / memcpy_s,
        f"{name}_load_back_ratio": load_back_s / memcpy_s,
        f"{name}_ratio": (backup_s + load_back_s) / (2 * memcpy_s),
    }


def run() -> dict[str, float]:
    figures: dict[str, float] = {}
    for row_kib in (16, GOAL_KIB, 256):
        figures |= measure(row_kib)
    for row_kib in LIST_KIB:
        figures |= measure_list(row_kib)
    return figures | {"host_copies_ratio": figures[f"host_copies_{GOAL_KIB}kib_ratio"]}


def main(argv: list[str]) -> int:
    description = "time backup and load-back on this host beside memcpy of the same bytes, and print them as JSON"
    argparse.ArgumentParser(prog="python -m benchmarks host_copies", description=description).parse_args(argv)
    print(json.dumps(run(), indent=2))
    return 0
