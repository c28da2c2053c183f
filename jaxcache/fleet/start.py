"""What ranks agree on once: before anything is allocated equal settings and the smallest capacities of all, and after
it that all could.

    | digest of the settings: d, ~d | device pages of each component | host pages of each | unused | clock |
    |<-------------------- unanimous: minimum over all ranks ------------------------------------>| leader |

The same reduction as in every step. The row has the same shape whatever the settings are, as they may differ; after
the allocation only its first lane counts, which is 1 where it went well.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcache import __version__
from jaxcache.agreement.collective import reduction_of
from jaxcache.agreement.lanes import CLOCK_MODULUS, DIGEST_LANES, NEUTRAL, are_equal, digest_lanes
from jaxcache.agreement.peers import Peers, ProcessReport
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.fleet.fleet import Fleet
from jaxcache.fleet.process_end import reason
from jaxcache.pools.page_layout import PageLayout, check_axes, page_layouts
from jaxcache.pools.storage_cells import unit_pages
from jaxcache.storage.base import Storage
from jaxcache.types import RanksDiverged, RankUnresponsive, Tier

MAX_COMPONENTS = 64
NUM_UNANIMOUS = DIGEST_LANES + 2 * MAX_COMPONENTS
CAPACITIES = {"device_pages": Tier.DEVICE, "host_pages": Tier.HOST}
REFUSED = -1  # instead of capacities, by a process whose settings cannot be
_starts: Counter[str] = Counter()  # by the devices of the mesh


class AgreedStart(NamedTuple):
    """The config that all ranks use, the layouts of its pages, and the fleet of the cache's later reports."""

    config: CacheConfig
    layouts: dict[str, PageLayout]
    fleet: Fleet


def agree_on_start(
    components: Sequence[Component], mesh: Mesh, config: CacheConfig, storage: Storage | None
) -> AgreedStart:
    """Every process of the mesh calls it with its own capacities, and everything else equal.

    Raises RanksDiverged, in all of them, naming what differs; RankUnresponsive if one does not come. ValueError for
    what cannot be; where only one process wants that, the others raise RanksDiverged, naming it and its reason.
    """
    check_axes(mesh)  # without them nothing can be told to anybody
    names = [component.name for component in components]
    said = settings(components, mesh, config, storage)
    layouts: dict[str, PageLayout] = {}
    own = {tier: dict.fromkeys(names[:MAX_COMPONENTS], REFUSED) for tier in CAPACITIES}
    problem = None
    try:
        if len(names) > MAX_COMPONENTS:
            raise ValueError(f"{len(names)} components, but a cache can have {MAX_COMPONENTS} at most")
        layouts = page_layouts(components, mesh, config.storage_grid)
        own = {pages: _pages(config, names, pages, tier) for pages, tier in CAPACITIES.items()}
    except Exception as error:
        problem = error
    topic = _topic(mesh)
    fleet = Fleet(mesh, config.agreement_timeout_s, topic)
    own_row = _row(said, [*own["device_pages"].values(), *own["host_pages"].values()])
    row = _reduced(own_row, mesh, fleet, "the agreement on capacities")
    fleet = Fleet(mesh, config.agreement_timeout_s, f"{topic}-{row[NUM_UNANIMOUS]}")
    if not are_equal(row):
        different = fleet.exchange_settings(said)
        raise problem or _error("the ranks' settings differ", fleet, different)
    if problem or REFUSED in row[DIGEST_LANES:NUM_UNANIMOUS]:
        failures = fleet.failures(reason(problem) if problem else "")
        raise problem or _error("another process refuses its own settings", fleet, failures)
    agreed = iter(row[DIGEST_LANES:NUM_UNANIMOUS].tolist())
    smallest = {tier: {name: next(agreed) for name in names} for tier in CAPACITIES}
    config = config if smallest == own else replace(config, **smallest)
    return AgreedStart(replace(config, storage_unit_pages=_units(config, components, layouts)), layouts, fleet)


@contextmanager
def all_or_none(mesh: Mesh, fleet: Peers, otherwise: str = "another process could not start") -> Iterator[None]:
    """Around what each process does for itself, such as to allocate: all come out of it, or none.

    Raises what failed here, when the others know it; RanksDiverged, which begins with `otherwise`, if it failed
    elsewhere, naming process and reason.
    """
    try:
        yield
    except Exception as error:
        with suppress(RankUnresponsive):  # what failed here says more
            _failures(mesh, fleet, reason(error))
        raise
    failures = _failures(mesh, fleet, "")
    if failures:
        raise _error(otherwise, fleet, failures)


def _failures(mesh: Mesh, fleet: Peers, own: str) -> list[str]:
    row = np.full(NUM_UNANIMOUS + 1, NEUTRAL, np.int32)
    row[0] = not own
    return [] if _reduced(row, mesh, fleet, "the agreement that all could start")[0] else fleet.failures(own)


def _error(what: str, fleet: Peers, lines: Sequence[str]) -> RanksDiverged:
    return RanksDiverged("\n  ".join([f"{what} (process {fleet.process})", *lines]))


def settings(
    components: Sequence[Component], mesh: Mesh, config: CacheConfig, storage: Storage | None
) -> dict[str, str]:
    """All that must be equal in all processes, by name, as text.

    Of versions: jaxcache's, for it decides; jax's, for the programs of a step must communicate in the same order; and
    Python's, for the digest of a step is a `hash`.
    """
    devices = [device.id for device in mesh.devices.flat]
    said = {"jaxcache": __version__, "jax": jax.__version__, "jaxlib": version("jaxlib")}
    said["python"] = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
    said |= {"mesh": f"{dict(mesh.shape)} of devices {devices}", "components": repr([c.name for c in components])}
    said |= {f"component {component.name}": repr(component) for component in components}
    for field in fields(config):
        value = config.__dict__[field.name]
        if field.name not in CAPACITIES:
            said[f"config.{field.name}"] = repr(sorted(value.items()) if isinstance(value, Mapping) else value)
    return said | {"storage": type(storage).__name__}


def _units(config: CacheConfig, components: Sequence[Component], layouts: Mapping[str, PageLayout]) -> dict[str, int]:
    """Pages of a unit of storage, by component. States are not consecutive: each is a value of its own."""
    units = {}
    for component in components:
        asked = None if config.storage_unit_pages is None else config.unit_pages(component.name)
        units[component.name] = 1 if not component.is_paged else asked or unit_pages(layouts[component.name])
    return units


def _pages(config: CacheConfig, names: Sequence[str], field: str, tier: Tier) -> dict[str, int]:
    pages = {name: config.pages_of(name, tier) for name in names}
    for name, count in pages.items():
        if count >= NEUTRAL:
            raise ValueError(f"{field} of component {name!r} must be below {NEUTRAL}, not {count}")
    return pages


def _topic(mesh: Mesh) -> str:
    """Of the reports at a start: replicas have other devices, and every process makes its caches in the same order."""
    devices = "-".join(str(device.id) for device in mesh.devices.flat)
    _starts[devices] += 1
    return f"{hashlib.sha256(devices.encode()).hexdigest()[:16]}-{_starts[devices]}"


def _row(said: Mapping[str, str], pages: Sequence[int]) -> np.ndarray:
    row = np.full(NUM_UNANIMOUS + 1, NEUTRAL, np.int32)
    digest = hashlib.sha256(repr(sorted(said.items())).encode()).digest()
    row[:DIGEST_LANES] = np.frombuffer(digest_lanes(int.from_bytes(digest[:8], "little")), np.int32)
    row[DIGEST_LANES : DIGEST_LANES + len(pages)] = pages
    row[NUM_UNANIMOUS] = time.time_ns() // 1_000_000 % CLOCK_MODULUS
    return row


def _reduced(row: np.ndarray, mesh: Mesh, fleet: Peers, what: str) -> np.ndarray:
    reduction = reduction_of(mesh)(mesh, NUM_UNANIMOUS)
    try:
        reduction.start(np.broadcast_to(row, (mesh.size, len(row))))
        return np.frombuffer(reduction.finish(fleet.wait_s, fleet.is_reported), np.int32)
    except RankUnresponsive as error:
        state = ProcessReport(0, 0, "nothing agreed yet", 0, [], {})
        raise fleet.unresponsive(what, error, state) from error
