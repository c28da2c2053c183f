"""Times backup and load-back against numpy's memcpy of the same bytes, in one run: python -m benchmarks host_copies.

backup     scattered pages into host rows, until they are there
load-back  host rows into scattered pages, until the pools are computed
ratio      (backup + load-back) / (memcpy of the bytes, once for each), medians of alternating turns
dispatch   what 24 pages of 4 KiB take of the serving thread, the scatter of a load-back included
lists      pools that are lists of 64 arrays, (backup + load-back) / the same of one array with as many bytes a page

Through the transfer engine, on the largest mesh of 1, 2, 4 or 8 devices that the host has: a serving process has many
devices. On CPUs each direction is one copy; what is left is Python's work for each page, and for each part of a list.
"""

from __future__ import annotations

import argparse
import json
import statistics

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.copies import Copies
from benchmarks.timing import seconds
from jaxcache.types import TransferKind

MESHES = {8: (2, 2, 2), 4: (2, 2, 1), 2: (1, 2, 1), 1: (1, 1, 1)}
NUM_MOVED, NUM_MOVED_LISTS = 64, 16  # pages
REPEATS = 30
WARMUPS = 3
GOAL_KIB = 64
SMALL_KIB, NUM_MOVED_SMALL = 4, 24
LIST_LAYERS, LIST_KIB = 64, (64, 2048, 8192)


def host_mesh() -> Mesh:
    """The largest that this host has."""
    num_devices = max(n for n in MESHES if n <= len(jax.devices()))
    axis_types, devices = (jax.sharding.AxisType.Auto,) * 3, jax.devices()[:num_devices]
    return jax.make_mesh(MESHES[num_devices], ("cp", "tp", "pp"), axis_types=axis_types, devices=devices)


def measure_list(row_kib: int) -> dict[str, float]:
    """What a list costs, for pages of `row_kib` KiB on each rank."""
    stacked, listed = (Copies(host_mesh(), row_kib << 10, NUM_MOVED_LISTS, n) for n in (1, LIST_LAYERS))
    actions = (stacked.backup, stacked.load_back, listed.backup, listed.load_back)
    rounds = [[seconds(action) for action in actions] for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    of_stacked = [statistics.median(times) for times in zip(*rounds, strict=True)]
    for copies in (stacked, listed):
        copies.engine.close()
    part_kib = row_kib // LIST_LAYERS
    return {f"host_copies_list_of_{LIST_LAYERS}_parts_of_{part_kib}kib": sum(of_stacked[2:]) / sum(of_stacked[:2])}


def measure(row_kib: int) -> dict[str, float]:
    """GB/s and ratios for pages of `row_kib` KiB on each rank."""
    copies = Copies(host_mesh(), row_kib << 10, NUM_MOVED)
    target, source = np.zeros(copies.num_bytes, np.uint8), np.ones(copies.num_bytes, np.uint8)
    actions = (lambda: np.copyto(target, source), copies.backup, copies.load_back)
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


def dispatch() -> dict[str, float]:
    """What a small transfer takes of the serving thread."""
    copies = Copies(host_mesh(), SMALL_KIB << 10, NUM_MOVED_SMALL)
    times: dict[TransferKind, list[float]] = {TransferKind.BACKUP: [], TransferKind.LOAD_BACK: []}
    for _ in range(WARMUPS + REPEATS):
        for kind, taken in times.items():
            taken.append(seconds(lambda kind=kind: copies.apply(kind)) + seconds(copies.apply))
            copies.engine.drain()
            jax.block_until_ready(copies.pools)
    copies.engine.close()
    return {
        f"host_copies_dispatch_{kind.name.lower()}_us": statistics.median(taken[WARMUPS:]) * 1e6
        for kind, taken in times.items()
    }


def run() -> dict[str, float]:
    figures = dispatch()
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
