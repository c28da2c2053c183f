"""CacheConfig: every choice a user can make, in one frozen value, validated once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxcache.types import PrefetchPolicy, Tier, WritePolicy

V = TypeVar("V")
PAGE_KERNELS = ("auto", "pallas", "xla")


class FrozenMapping(Mapping[str, V]):
    """A copy of a mapping that nobody changes: it has a hash, and equals any mapping with the same entries."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, V]):
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)


@dataclass(frozen=True)
class TenantShare:
    """What one tenant is sure of, and what it may have at most: shares of the pages of every component and tier."""

    floor: float = 0.0
    quota: float = 1.0

    def __post_init__(self):
        for name in ("floor", "quota"):
            value = self.__dict__[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a share of the pages, not {value!r}")
        if not (0 <= self.floor <= self.quota <= 1 and self.quota > 0):
            raise ValueError(f"{self.floor=} and {self.quota=} must be 0 <= floor <= quota <= 1, and quota above 0")


@dataclass(frozen=True)
class CacheConfig:
    """How big the tiers are and how the cache behaves. Mappings are copied, so that a config is a value with a hash.

    page_tokens:            tokens per page
    device_pages:           pages of every component on the device, or {component name: pages}
    host_pages:             the same for host memory; 0: no host tier
    write_policy:           when device pages are copied to host memory
    selective_hits:         write_through_selective copies a node from this many hits on
    eviction_policy:        order of eviction; only "priority" looks at the priorities of inserts
    tenants:                limits of tenants, by the value of the namespace field `tenant`; all others share the rest
    max_retain_steps:       longest retention that `insert` may ask for, in steps
    max_retained_share:     share of the device pages of a component that retentions may keep from leaving
    evict_output_first:     full attention of generated text leaves before that of prompts; windows and states do not,
                            as the next turn begins at its end
    stable_tables:          page ids of a running lease never change, for loops whose tables only grow: a page that the
                            tree has, too, stays the lease's own until its release. (Ids behind a window still become
                            num_pages, and may be another's then: no model step reads or writes there.)
                            False: `insert` replaces such ids, and the next `Cache.tables` gives the pages back
    load_back_min_tokens:   a shorter load-back is recomputed instead
    max_states_per_path:    recurrent states kept along one path; those from which the only way on leads to a later
                            one go first, the shallow ones before others
    prefetch_policy:        what `admit` does with a running prefetch
    prefetch_timeout_s, prefetch_timeout_s_per_1k_tokens:
                            how long PrefetchPolicy.TIMEOUT waits, from the first time that the request was held up
    prefetch_min_tokens:    storage is not asked for less
    prefetch_if_faster:     what storage has is fetched only if storage has brought tokens faster, so far, than prefill
                            computes them on this host (every 16th is fetched all the same, to measure again)
    prefetch_host_share:    share of the host pages that prefetches may reserve at once
    store_time_share:       share, in (0, 1], of one thread's processor time that STOREs may take while requests run;
                            what waits longer than `max_queued_stores` allows is dropped. None: 0.02 where the devices
                            are the host's own cores, else 1
    max_stores:             STORE transfers in flight; later ones queue
    max_queued_stores:      queued ones; later ones are dropped and counted
    max_stored_beliefs:     pages remembered as already stored
    max_live_transfers:     storage transfers that one agreement carries, at least two more than max_stores. With 16 and
                            20 live ones, of which 18 are undecided: the 15 oldest of those, and in the 16th lane one of
                            the two that await only quiet, by turns
    agreement_every_steps:  with no storage transfer live, the digest is exchanged every so many steps; ranks that
                            differ are found within twice as many
    agreement_timeout_s:    bound on waiting for the other ranks: then one of them is unresponsive, and serving ends
    max_transfer_pages:     pages of the largest transfer program; longer transfers are cut. On GPUs up to twice as
                            many pages of each component are kept beside the pools, for load-backs to come
    page_kernels:           which programs copy pages on GPUs: "pallas", "xla", or "auto": the one that measured faster
    storage_grid:           (cp, tp, pp): into how many values of storage slots, heads and layers of a page are cut, a
                            multiple of the mesh in each axis; meshes with the same grid share storage. None: the mesh
    storage_unit_pages:     how many consecutive pages at most share a value of storage, a power of two, or
                            {component name: ...}. None: so many that values reach 256 KiB
    storage_threads:        workers for storage
    storage_deadline_s:     a storage transfer that takes longer is a miss
    collect_in_step:        Python's garbage collector runs in `step` only, in the whole process, and never goes through
                            the tree while requests run: pauses of 2 to 5 ms, not of 0.3 s at 10^5 nodes. Dead
                            cycles of your own objects may then stay until nothing runs, and all of them until `close`
                            if the loop stops without it
    events:                 what comes and goes is noted for `Cache.take_events`
    max_logged_changes:     changes that wait for it; then what is there now takes their place
    caching:                False: same interface, nothing is ever found (for comparison)
    """

    page_tokens: int
    device_pages: int | Mapping[str, int]
    host_pages: int | Mapping[str, int] = 0
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    selective_hits: int = 2
    eviction_policy: str = "lru"
    tenants: Mapping[str, TenantShare] = FrozenMapping({})
    max_retain_steps: int = 100_000
    max_retained_share: float = 0.25
    evict_output_first: bool = True
    stable_tables: bool = False
    load_back_min_tokens: int = 1
    max_states_per_path: int = 4
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.BEST_EFFORT
    prefetch_timeout_s: float = 1.0
    prefetch_timeout_s_per_1k_tokens: float = 0.25
    prefetch_min_tokens: int = 256
    prefetch_if_faster: bool = True
    prefetch_host_share: float = 0.5
    store_time_share: float | None = None
    max_stores: int = 4
    max_queued_stores: int = 256
    max_stored_beliefs: int = 1 << 20
    max_live_transfers: int = 16
    agreement_every_steps: int = 1
    agreement_timeout_s: float = 60.0
    max_transfer_pages: int = 256
    page_kernels: str = "auto"
    storage_grid: tuple[int, int, int] | None = None
    storage_unit_pages: int | Mapping[str, int] | None = None
    storage_threads: int = 4
    storage_deadline_s: float = 5.0
    collect_in_step: bool = False
    events: bool = False
    max_logged_changes: int = 1 << 16
    caching: bool = True

    def __post_init__(self):
        for name in _POSITIVE:
            value = self.__dict__[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
        for name, kind in (("write_policy", WritePolicy), ("prefetch_policy", PrefetchPolicy)):
            if not isinstance(self.__dict__[name], kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {self.__dict__[name]!r}")
        if self.max_stores + 1 >= self.max_live_transfers:  # one is for transfers of which only quiet is awaited
            raise ValueError(f"{self.max_stores=} must leave two of {self.max_live_transfers=} to others")
        if self.page_kernels not in PAGE_KERNELS:
            raise ValueError(f"page_kernels must be one of {PAGE_KERNELS}, not {self.page_kernels!r}")
        if not 0 < self.prefetch_host_share <= 1:
            raise ValueError(f"{self.prefetch_host_share=} must be in (0, 1]")
        share = self.store_time_share
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise ValueError(f"store_time_share must be in (0, 1], or None, not {share!r}")
        for name in _SECONDS:
            seconds = self.__dict__[name]
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
                raise ValueError(f"{name} must be seconds, not {seconds!r}")
        for name in ("storage_deadline_s", "agreement_timeout_s"):
            if not self.__dict__[name]:
                raise ValueError(f"{name} must be positive seconds, not 0")
        if not 0 <= self.max_retained_share < 1 - ROUNDING:
            raise ValueError(f"{self.max_retained_share=} must be in [0, 1): retentions must never fill the cache")
        self._check_grid()
        self._check_tenants()
        self._check_unit()
        for name in ("device_pages", "host_pages", "tenants", "storage_unit_pages"):
            self._freeze(name)

    def with_policies(self, prefetch_policy: PrefetchPolicy | None, write_policy: WritePolicy | None) -> CacheConfig:
        """The same with other policies. None: as before."""
        return replace(
            self,
            prefetch_policy=prefetch_policy or self.prefetch_policy,
            write_policy=write_policy or self.write_policy,
        )

    def _freeze(self, name: str) -> None:
        value = self.__dict__[name]
        if isinstance(value, Mapping):
            object.__setattr__(self, name, FrozenMapping(value))

    def _check_grid(self) -> None:
        grid = self.storage_grid
        if grid is None:
            return
        if not isinstance(grid, tuple) or len(grid) != 3 or not all(type(n) is int and n > 0 for n in grid):
            raise ValueError(f"storage_grid must be three positive ints (cp, tp, pp), not {grid!r}")

    def _check_unit(self) -> None:
        units = self.storage_unit_pages
        for unit in units.values() if isinstance(units, Mapping) else () if units is None else (units,):
            if type(unit) is not int or unit < 1 or unit & (unit - 1):
                raise ValueError(f"storage_unit_pages must be powers of two, not {unit!r}")

    def unit_pages(self, component: str) -> int:
        """The entry of `storage_unit_pages` for one component; 1 where nothing is said."""
        units = self.storage_unit_pages
        return units.get(component, 1) if isinstance(units, Mapping) else units or 1

    def _check_tenants(self) -> None:
        if not isinstance(self.tenants, Mapping):
            raise ValueError(f"tenants must be {{name: TenantShare}}, not {self.tenants!r}")
        for name, share in self.tenants.items():
            if not isinstance(name, str) or not name or not isinstance(share, TenantShare):
                raise ValueError(f"tenants must be {{name: TenantShare}}, not {name!r}: {share!r}")
        floors = sum(share.floor for share in self.tenants.values())
        if floors > 1 + ROUNDING:
            raise ValueError(f"the floors of tenants must not add up to more than 1, but {floors=}")

    def pages_of(self, component: str, tier: Tier) -> int:
        """The entry of `device_pages` or `host_pages` for one component."""
        pages = self.device_pages if tier is Tier.DEVICE else self.host_pages
        at_least = 1 if tier is Tier.DEVICE else 0
        count = pages.get(component) if isinstance(pages, Mapping) else pages
        if not isinstance(count, int) or isinstance(count, bool) or count < at_least:
            raise ValueError(f"component {component!r} needs an int of at least {at_least} pages, not {count!r}")
        return count


ROUNDING = 1e-9  # 0.6 + 0.3 + 0.1 may be a little more than 1, and 0.29 * 100 a little less than 29


def pages_of_share(share: float, num_pages: int) -> int:
    """Whole pages that a share of `num_pages` is."""
    return int(share * num_pages + ROUNDING)


_SECONDS = ("storage_deadline_s", "prefetch_timeout_s", "prefetch_timeout_s_per_1k_tokens", "agreement_timeout_s")
_POSITIVE = (
    "page_tokens",
    "selective_hits",
    "load_back_min_tokens",
    "max_states_per_path",
    "max_retain_steps",
    "prefetch_min_tokens",
    "max_stores",
    "max_queued_stores",
    "max_stored_beliefs",
    "max_live_transfers",
    "agreement_every_steps",
    "max_logged_changes",
    "max_transfer_pages",
    "storage_threads",
)
