"""A whole cache to a folder and back: the tree, and every page of device and host memory once.

    device pool --gather--> staging --whole--> words --Orbax--> part-0000, part-0001, ..., at last the tree
    host rows   ----------> staging                                |
    device pool <--scatter-- staging <--staged-- words <--Orbax----'   every page summed before the tree is made
    host rows   <----------- staging

Pages go through in chunks of one transfer program, so neither device nor host memory needs room for a second pool. What
a cache holds changes in the last call only (core/restoring.py): whatever fails before it leaves an empty cache.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from os import PathLike
from typing import NamedTuple

import jax
import numpy as np
from xxhash import xxh3_64_hexdigest

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.restoring import Placement, Restoring, check_quiet, placements
from jaxcache.core.serving import RefusedCall, RefusedValue
from jaxcache.core.tree_record import NOWHERE, Sources, TreeRecord, record_of, sources_of
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.fleet.start import all_or_none
from jaxcache.pools.device_pool import DevicePools, Staging, bucket_pages, init_pools
from jaxcache.pools.storage_units import chunks
from jaxcache.pools.whole_pages import abstract_words, page_sums, staged, whole
from jaxcache.runtime.controller import Controller
from jaxcache.runtime.snapshot_files import Pages, SnapshotFiles
from jaxcache.runtime.snapshot_manifest import Manifest, checked, checksum, manifest_of
from jaxcache.types import RanksDiverged, Tier

PART_BYTES = 1 << 28  # of pages that one checkpoint holds, so that few files are large and few pages wait
NO_ARRAYS = ("namespaces", "retired", "page_tokens", "orders")


class Chunk(NamedTuple):
    """Pages [first, last) of a component, in the snapshot's order; rows: how many it has in its part, the last ones of
    which may be undefined."""

    component: str
    first: int
    last: int
    rows: int
    part: int

    @property
    def name(self) -> str:
        return f"{self.component}-{self.first:08}"


class Snapshots:
    """Of one cache. Every process of a replica makes the same calls."""

    def __init__(self, core: PrefixCache, controller: Controller[DeviceEffects]):
        self.core = core
        self.controller = controller
        self.engine = controller.engine
        self.mover = controller.engine.effects.mover
        self.layouts = self.mover.layouts

    def _together(self, begin: Callable[[], None]) -> None:
        """All processes begin, or none: then nothing has changed, and RuntimeError says which could not, and why."""
        try:
            with all_or_none(self.mover.mesh, self.controller.fleet, "another process cannot use the folder"):
                begin()
        except RanksDiverged as error:
            raise RefusedCall(str(error)) from error

    # ---- there

    def write(self, pools: DevicePools, directory: str | PathLike[str]) -> None:
        """See Cache.snapshot. pools: not donated"""
        self.core.serving.check()
        files = SnapshotFiles(directory)
        check_quiet(self.core)
        self._together(files.make_folder)
        sources, origins = sources_of(self.core)
        record = record_of(self.core, origins)
        parts: list[Chunk] = []
        sums: dict[str, list[np.ndarray]] = {name: [] for name in self.layouts}
        waiting: Pages = {}
        num_bytes = part = 0
        for chunk, staging in self._chunks(pools, sources):
            layout = self.layouts[chunk.component]
            words = whole(layout, staging)
            summed = page_sums(layout, words)
            waiting[chunk.name] = words
            parts.append(chunk._replace(part=part))
            sums[chunk.component].append(self._read(summed)[: chunk.last - chunk.first])
            num_bytes += chunk.rows * layout.page_bytes
            if num_bytes >= PART_BYTES:
                files.write_pages(part, waiting)
                waiting, num_bytes, part = {}, 0, part + 1
        if waiting:
            files.write_pages(part, waiting)
        tree = packed(record, {name: np.concatenate(found) for name, found in sums.items() if found})
        num_pages = dict(zip(self.layouts, (found.num_pages for found in sources), strict=True))
        files.write_tree(manifest_of(self.core.components, record, num_pages, [list(c) for c in parts], tree), tree)

    def _chunks(self, pools: DevicePools, sources: list[Sources]) -> Iterator[tuple[Chunk, Staging]]:
        """All pages, as staging arrays of one tier each."""
        for (name, layout), (device_ids, host_ids) in zip(self.layouts.items(), sources, strict=True):
            if not layout.fields:
                continue
            for tier, page_ids, first in ((Tier.DEVICE, device_ids, 0), (Tier.HOST, host_ids, len(device_ids))):
                for piece in chunks(len(page_ids), self.mover.max_bucket):
                    ids = page_ids[piece]
                    if tier is Tier.DEVICE:
                        staging = self.mover.gather(name, pools[name], ids)
                    else:
                        self.engine.wait_to_read(name, ids)
                        staging = self.engine.effects.read_host(name, ids)
                    yield Chunk(name, first + piece.start, first + piece.stop, bucket_pages(len(ids)), 0), staging

    def _read(self, array: jax.Array) -> np.ndarray:
        self.controller.wait([array])
        return np.asarray(array)

    # ---- and back

    def read(self, directory: str | PathLike[str]) -> DevicePools:
        """See Cache.restore."""
        self.core.serving.check()
        files = SnapshotFiles(directory)
        self._together(files.check_there)
        found = self._find(files)
        with self.controller.needed():
            num_pages = {device.component.name: device.allocator.num_pages for device in self.core.tiers.device}
            return self._read_pages(init_pools(self.layouts, num_pages, self.mover.mesh), files, found)

    def _read_pages(self, pools: DevicePools, files: SnapshotFiles, found: Found) -> DevicePools:
        """pools: donated"""
        record, sums = found.record, found.sums
        fitted = Restoring(self.core).fitted(record)
        placed = placements(self.core, fitted)
        pools = dict(pools)
        by_part: dict[int, list[Chunk]] = {}
        for chunk in found.chunks:
            by_part.setdefault(chunk.part, []).append(chunk)
        targets = self._targets(found, placed)
        for part, of_part in by_part.items():
            if not any(_is_needed(chunk, targets[chunk.component]) for chunk in of_part):
                continue
            abstract = {chunk.name: abstract_words(self.layouts[chunk.component], chunk.rows) for chunk in of_part}
            pages = files.read_pages(part, abstract)
            for chunk in of_part:
                words = pages.pop(chunk.name)
                self._check_sums(chunk, words, sums[chunk.component])
                pools = self._place(pools, chunk, words, targets[chunk.component])
        pools = jax.block_until_ready(pools)
        Restoring(self.core).adopt(fitted, placed, int(checksum(found.manifest), 16))
        counters = self.core.counters
        counters["restored_tokens"] += fitted.num_tokens
        counters["restore_dropped_tokens"] += record.num_tokens - fitted.num_tokens
        counters["restore_dropped_pages"] += found.num_pages - _num_held(placed, len(self.layouts))
        return pools

    def _targets(self, found: Found, placed: list[Placement]) -> dict[str, list[np.ndarray]]:
        """By component and tier int32[pages of the snapshot]: where each goes; NOWHERE: it does not."""
        num, targets = len(self.layouts), {}
        for c, name in enumerate(self.layouts):
            num_pages = found.manifest["num_pages"][name]
            targets[name] = [np.full(num_pages, NOWHERE, np.int32) for _ in range(2)]
            for tier, placement in enumerate((placed[c], placed[c + num])):
                targets[name][tier][placement.sources] = placement.page_ids
        return targets

    def _check_sums(self, chunk: Chunk, words: dict[str, jax.Array], expected: np.ndarray) -> None:
        got = self._read(page_sums(self.layouts[chunk.component], words))[: chunk.last - chunk.first]
        bad = np.flatnonzero((got != expected[chunk.first : chunk.last]).any(axis=1))
        if len(bad):
            raise RefusedValue(
                f"the snapshot is damaged: {len(bad)} pages of {chunk.component} in part {chunk.part}, from page "
                f"{chunk.first + int(bad[0])} on, do not have the content that was saved"
            )

    def _place(
        self, pools: DevicePools, chunk: Chunk, words: dict[str, jax.Array], targets: list[np.ndarray]
    ) -> DevicePools:
        """Writes a chunk's pages to device and host memory."""
        name, layout = chunk.component, self.layouts[chunk.component]
        for tier, target in enumerate(targets):
            page_ids = target[chunk.first : chunk.last]
            rows = np.flatnonzero(page_ids != NOWHERE).astype(np.int32)
            for piece in chunks(len(rows), self.mover.max_bucket):
                padded = np.zeros(bucket_pages(len(rows[piece])), np.int32)
                padded[: len(rows[piece])] = rows[piece]
                staging, ids = staged(layout, words, padded), page_ids[rows[piece]]
                if tier == Tier.DEVICE:
                    pools[name] = self.mover.scatter(name, pools[name], ids, staging)
                else:
                    self.engine.wait_to_write(name, ids)
                    self.engine.effects.write_host(name, ids, staging)
        return pools

    def _find(self, files: SnapshotFiles) -> Found:
        """What a folder holds, checked against this cache; no page is read. Raises ValueError, RuntimeError."""
        manifest = files.read_manifest()
        checked(manifest, self.core.components, self.core.config.page_tokens)
        tree = files.read_tree()
        if xxh3_64_hexdigest(tree) != manifest["tree"]:
            raise RefusedValue(f"the snapshot in {files.folder} is damaged: its tree is not the one that was saved")
        record, sums = unpacked(tree)
        Restoring(self.core).check(record)
        return Found(manifest, record, sums, [Chunk(*chunk) for chunk in manifest["chunks"]])


class Found(NamedTuple):
    """A snapshot but for its pages. sums: uint32[pages, fields] by component"""

    manifest: Manifest
    record: TreeRecord
    sums: dict[str, np.ndarray]
    chunks: list[Chunk]

    @property
    def num_pages(self) -> int:
        return sum(self.manifest["num_pages"].values())


def _is_needed(chunk: Chunk, targets: list[np.ndarray]) -> bool:
    return any(bool((target[chunk.first : chunk.last] != NOWHERE).any()) for target in targets)


def _num_held(placed: list[Placement], num: int) -> int:
    """Pages of the snapshot that are on the device, in host memory, or both."""
    both = zip(placed[:num], placed[num:], strict=True)
    return sum(len(np.union1d(device.sources, host.sources)) for device, host in both)


def packed(record: TreeRecord, sums: dict[str, np.ndarray]) -> bytes:
    """A record and the sums of its pages. Fields of namespaces may be secrets: they are here, since Orbax logs what it
    cannot parse of the manifest."""
    arrays = {f.name: record.__dict__[f.name] for f in fields(record) if f.name not in NO_ARRAYS}
    arrays |= {f"order.{r}": order for r, order in enumerate(record.orders)}
    arrays |= {f"sums.{name}": of_component for name, of_component in sums.items()}
    others = {
        "namespaces": [dict(of_namespace) for of_namespace in record.namespaces],
        "retired": [digest.hex() for digest in record.retired],
        "page_tokens": record.page_tokens,
    }
    arrays["others"] = np.frombuffer(json.dumps(others).encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def unpacked(tree: bytes) -> tuple[TreeRecord, dict[str, np.ndarray]]:
    with np.load(io.BytesIO(tree), allow_pickle=False) as file:
        arrays = dict(file)
    others = json.loads(arrays.pop("others").tobytes())
    sums = {name: array for name, array in arrays.items() if name.startswith("sums.")}
    orders = [array for name, array in arrays.items() if name.startswith("order.")]
    record = TreeRecord(
        namespaces=tuple(others["namespaces"]),
        retired=tuple(bytes.fromhex(digest) for digest in others["retired"]),
        page_tokens=others["page_tokens"],
        orders=tuple(orders),
        **{f.name: arrays[f.name] for f in fields(TreeRecord) if f.name not in NO_ARRAYS},
    )
    return record, {name.removeprefix("sums."): array for name, array in sums.items()}
