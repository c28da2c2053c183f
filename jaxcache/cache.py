"""Cache: the face. Wires core, pools, storage and runtime for one data-parallel replica; decides nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcache.agreement.collective import agreement_on
from jaxcache.components import Component
from jaxcache.config import CacheConfig
from jaxcache.core.bad_input import count, said
from jaxcache.core.explain import Explanation
from jaxcache.core.kinds import validate, with_spine
from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import Ticket
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.serving import RefusedCall, RefusedType, changes
from jaxcache.core.tokens import Namespace
from jaxcache.core.tokens import Sequence as TokenSequence
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.fleet.fleet import Fleet
from jaxcache.fleet.start import agree_on_start, all_or_none
from jaxcache.pools.device_pool import DevicePools, init_pools
from jaxcache.pools.pools_check import PoolsCheck
from jaxcache.runtime.batch_tables import BatchTables, state_slots_of, tables_of
from jaxcache.runtime.controller import Controller
from jaxcache.runtime.events import EventStream
from jaxcache.runtime.garbage import GarbageControl
from jaxcache.runtime.snapshot import Snapshots
from jaxcache.storage.base import Storage
from jaxcache.types import CLOCK_MODULUS, Event, Match, PrefetchPolicy, StateSlots, Tier, Wait, WritePolicy

T = TypeVar("T")
DRAIN_SLICE_S = 0.05  # between the steps of a drain, which all processes take together


class Cache:
    """A hierarchical prefix cache on a mesh with the axes cp, tp and pp.

        cache = Cache(components, mesh, config, storage=FileStorage(path))
        pools = cache.init_pools()
        while serving:
            pools = cache.step(pools)              once per iteration
            lease = cache.admit(cache.sequence(tokens, namespace), num_new_tokens=chunk)
            pools = cache.apply(pools)             required before a model step
            logits, pools = model_step(params, pools, cache.tables([lease], max_pages), ...)
            cache.insert(lease, num_computed)
            cache.release(lease)

    `pools` is a value, {component: {field: Array}}: calls that change it return the new one. Serving thread only; in a
    fleet every process makes the same calls in the same order.
    """

    def __init__(
        self, components: Sequence[Component], mesh: Mesh, config: CacheConfig, storage: Storage | None = None
    ):
        if storage is not None:
            _check_storage(storage)
        self.mesh = mesh
        components = tuple(components)
        validate(components, config)
        components, config = with_spine(components, config)
        config, self.layouts, fleet = agree_on_start(components, mesh, config, storage)
        self.config = config
        with all_or_none(mesh, fleet):
            self._allocate(components, mesh, storage, fleet)
        self._garbage = GarbageControl()
        if config.collect_in_step:
            self._garbage.start()

    def _allocate(self, components: Sequence[Component], mesh: Mesh, storage: Storage | None, fleet: Fleet) -> None:
        config = self.config
        self.core = PrefixCache(tuple(components), config)
        self.serving = self.core.serving
        if storage is not None:
            self.core.attachment.attach(type(storage).__name__)
        self._events = EventStream(self.core.tiers) if config.events else None
        self.storage = storage
        self.device_pages = {r.component.name: r.allocator.num_pages for r in self.core.tiers.device}
        self._tables = BatchTables(self.device_pages)
        self._pools_check = PoolsCheck(self.layouts, self.device_pages)
        self.core.leases.pools_have_come(self._pools_check.version)  # from here on the order of model steps is watched
        effects = DeviceEffects(
            self.layouts, mesh, self.device_pages, self._host_pages(), config.max_transfer_pages, config.page_kernels
        )
        self.engine = TransferEngine(
            effects,
            effects.parts({name: config.unit_pages(name) for name in self.layouts}),
            storage,
            deadline_s=config.storage_deadline_s,
            num_threads=config.storage_threads,
            page_tokens=config.page_tokens,
            store_share=effects.store_share(config.store_time_share),
        )
        agreement = agreement_on(mesh, list(self.layouts), config.max_live_transfers)
        self._controller = Controller(self.core, self.engine, agreement, fleet)
        self._closed = False

    def _host_pages(self) -> dict[str, int]:
        return {r.component.name: r.allocator.num_pages for r in self.core.tiers.host}

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- pools

    def init_pools(self) -> DevicePools:
        """Zeroed device pools {component: {field: Array[num_pages, ...]}}; MemoryError if they do not fit.
        In a fleet that ends serving, and the other processes hear why. Raises RuntimeError while the device tier holds
        anything: these pools would not."""
        device = self.core.tiers.device
        if self.core.leases or any(residency.num_resident for residency in device):
            raise RefusedCall("this cache has pages on the device: if they are lost, call forget_device() first")
        with self._controller.needed():
            return init_pools(self.layouts, self.device_pages, self.mesh)

    def warmup(self, pools: DevicePools) -> DevicePools:
        """Compiles every transfer program, so that nothing compiles while serving; pools come back unchanged."""
        self._check_open()
        self._check_pools(pools)
        pools = self.engine.effects.warmup(pools)
        self._pools_check.handed_back(pools)
        return pools

    def _check_pools(self, pools: DevicePools) -> None:
        self._pools_check.check(pools)
        self.core.leases.pools_have_come(self._pools_check.version)

    def _check_open(self) -> None:
        if self._closed:
            raise RefusedCall("the cache is closed")

    # ---- the loop

    def step(self, pools: DevicePools) -> DevicePools:
        """Begins an iteration: takes agreed outcomes, issues the next agreement. Returns the same pools.

        Raises RanksDiverged, RankUnresponsive or TransferFault when serving must stop; ValueError for pools that are
        stale, or of another shape, dtype or sharding than `init_pools` makes.
        """
        self._check_open()
        self._check_pools(pools)
        try:
            with jax.profiler.TraceAnnotation("jaxcache.step"):
                self._controller.step()
        finally:
            self._garbage.step(is_idle=not self.core.leases)
            if self.serving.ended is not None:
                self._garbage.stop()  # no step comes any more
        return pools

    def apply(self, pools: DevicePools) -> DevicePools:
        """Dispatches every planned move, in order; donates pools if anything is loaded. Due before a model step.

        Raises ValueError as `step` does. RuntimeError, and nothing has changed, if pages would be backed up that were
        inserted before the model step that computes them: pass on the pools which that step returned.
        """
        self._check_open()
        self._check_pools(pools)
        return self._apply(pools)

    @changes  # the pools that were given may be gone before the new ones are known
    def _apply(self, pools: DevicePools) -> DevicePools:
        with jax.profiler.TraceAnnotation("jaxcache.apply"):
            pools = self._controller.apply(pools)
        self._pools_check.handed_back(pools)
        return pools

    def wait(self, arrays: T) -> T:
        """Until all jax arrays of a pytree are computed, like `jax.block_until_ready`, but no longer than the bound.

        Read what a model step returns through this: if a rank died or stopped, its collectives fail or stay pending
        for ever. Raises RankUnresponsive then; one process alone gets the runtime's own errors.
        """
        self._controller.wait([leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)])
        return arrays

    def tables(self, leases: Sequence[Lease | None], max_pages: int) -> dict[str, np.ndarray]:
        """Page tables of a batch, int32[len(leases), max_pages] per component; None: an empty row.

        Ask for new ones before every model step: `insert` replaces ids of pages that the tree has, too, and the lease's
        own such pages are another's from this call on. So no earlier table of these leases may be used any more (unless
        `CacheConfig.stable_tables`); like every call, all processes make it in the same step.
        Raises RuntimeError while a plan is unapplied, or for a lease whose first_step has not come; ValueError for one
        that was released or is another cache's: its pages may be somebody else's by now.
        """
        max_pages = count("max_pages", max_pages, 1)
        return tables_of(self.core, self._tables, leases, max_pages)

    def state_slots(self, leases: Sequence[Lease | None], ends: Sequence[int]) -> StateSlots | None:
        """Slots of recurrent states for a batch whose rows compute up to `ends`; None if no component is one.

        Rows begin where their leases have computed (what `admit` and `grow` were told). End chunks at
        `lease.next_stop`, and name the ends that are in `lease.checkpoints` in `insert(states=...)`.
        """
        return state_slots_of(self.core, leases, ends)

    @property
    def step_number(self) -> int:
        """How many steps have begun; compare with `Lease.first_step`."""
        return self.core.step_number

    @property
    def idle(self) -> bool:
        """No request runs and no copy is in flight whose end would make room on the device."""
        return not self.core.is_busy()

    # ---- requests

    def new_namespace(self, **fields: str) -> Namespace:
        """What tokens mean: model=, weights_version=, adapter=, tenant_salt=, any other key; the layout is added.

        tenant=: whose limits hold, if `CacheConfig.tenants` has any for it; its namespaces share them.
        Namespaces that differ in any field never share a page, on any tier. Raises ValueError for the fields of one
        that was retired, since storage may still hold its pages: name the new weights by another weights_version.
        """
        if "page_layout" in fields:
            raise ValueError("page_layout is what the cache itself says of its pages: name the field otherwise")
        layout = "; ".join(f"{name}: {component}" for name, component in self._layout_fields())
        return self.core.new_namespace(**fields, page_layout=layout)

    def _layout_fields(self) -> list[tuple[str, str]]:
        components = [(component.name, repr(component)) for component in self.core.components]
        return [("page_tokens", str(self.config.page_tokens)), *components]

    def retire_namespace(self, namespace: Namespace) -> None:
        """After new weights: everything of the old version is unreachable at once; its pages are reclaimed lazily.

        The same fields never make a namespace again in this cache. Do not retire what is to come back.
        """
        self.core.retire_namespace(namespace)

    def sequence(self, tokens: Any, namespace: Namespace) -> TokenSequence:
        """A request's tokens (list, numpy ints, jax array on the host), converted once; `extend` it while decoding."""
        return self.core.sequence(tokens, namespace)

    def extend_all(self, sequences: list[TokenSequence], tokens: Any) -> None:
        """Appends one generated token to each sequence, as `Sequence.extend` does for one, in half the time.

        tokens: list, numpy int array, or jax array on the host: one for each sequence
        Raises ValueError or TypeError, and no sequence has changed, where one cannot be extended.
        """
        self.core.extend_all(sequences, tokens)

    def match(self, sequence: TokenSequence, max_tokens: int | None = None) -> Match:
        """Where a request could resume; changes nothing."""
        return self.core.match(sequence, max_tokens)

    def prefetch(self, sequence: TokenSequence) -> Ticket | None:
        """Asks storage for what follows the match, while the request waits; None where that cannot pay."""
        self._check_open()
        return self.core.prefetch(sequence)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing more is wanted of a prefetch."""
        self.core.cancel(ticket)

    def admit(
        self,
        sequence: TokenSequence,
        num_new_tokens: int,
        ticket: Ticket | None = None,
        max_cached_tokens: int | None = None,
    ) -> Lease | Wait:
        """A Lease on the longest resumable prefix with room for the next chunk; or Wait: nothing has changed."""
        self._check_open()
        return self.core.admit(sequence, num_new_tokens, ticket, max_cached_tokens)

    def grow(self, lease: Lease, num_computed: int, num_new_tokens: int) -> bool:
        """Room for `num_new_tokens` after `num_computed`; False: nothing has changed.

        Then `apply`, ask for the `tables` of all whose `first_step` has come, since pages that only earlier tables name
        are held until you do, and ask again; if there is still no room, retract somebody.
        """
        has_room = self.core.grow(lease, num_computed, num_new_tokens)
        if has_room and num_new_tokens > 1:
            self.engine.rates.prefills(int(num_new_tokens))
        return has_room

    def grow_all(self, leases: list[Lease], num_computed: list[int], num_new_tokens: int = 1) -> int:
        """`grow` for all that decode in a step, in a third of the time. Returns how many, from the first on, have room.

        If that is not all of them, do as `grow` says, and ask again for the others.
        """
        return self.core.grow_all(leases, num_computed, num_new_tokens)

    def insert(
        self,
        lease: Lease,
        num_computed: int,
        *,
        states: list[int] | tuple[int, ...] = (),
        priority: int = 0,
        retain_steps: int = 0,
    ) -> None:
        """Publishes the whole pages of what is computed by model steps that have been dispatched.

        states:       positions of `lease.checkpoints` whose slots these model steps have written. Without, a recurrent
                      state is not kept, which costs later hits (the counter `unwritten_states`)
        priority:     an int >= 0. With eviction_policy="priority" the lowest leaves first; a page has the highest that
                      it was ever inserted with. No other policy looks at it
        retain_steps: an int in [0, max_retain_steps]. What resuming at the published end needs stays on the device
                      until so many more steps have begun, as long as all that is kept so fits `max_retained_share`;
                      otherwise the counter `retentions_refused` counts it
        Every process of a replica passes the same. Raises ValueError for anything else.
        """
        self.core.insert(lease, num_computed, states=states, priority=priority, retain_steps=retain_steps)

    def release(self, lease: Lease) -> None:
        """Gives back what the lease holds; raises ValueError the second time."""
        self.core.release(lease)
        if not self.core.leases:
            self.engine.serves(False)

    def explain(self, sequence: TokenSequence) -> Explanation:
        """Why a prompt is a hit or a miss: first page that differs, tier of every page, who evicted the missing one."""
        return self.core.explain(sequence)

    # ---- storage and policies, at run time

    @changes
    def attach_storage(self, storage: Storage) -> None:
        """Asks this storage from now on, and writes to it: what host memory holds already, too.

        Raises TypeError for what is no Storage, RuntimeError if one is attached, ValueError without a host tier; then
        nothing has changed. Every process of a replica does the same in the same step, here and below.
        """
        self._check_open()
        _check_storage(storage)
        self.core.attachment.attach(type(storage).__name__)
        self.storage = storage
        self.engine.set_storage(storage)

    @changes
    def detach_storage(self) -> None:
        """Nothing more is asked or written; no request is lost. Raises RuntimeError if none is attached.

        Does not wait: transfers that had begun still use it, so close it once `storage_in_use(storage)` is false.
        """
        self._check_open()
        self.core.attachment.detach()
        self.storage = None
        self.engine.set_storage(None)

    def storage_in_use(self, storage: Storage) -> bool:
        """Whether this storage is attached, or a call of it is still waiting or under way here.

        Differs between processes: look at it inside the loop, and never end a loop for it that calls `step`.
        """
        return storage is self.storage or self.engine.calls(storage)

    def clear_storage(self) -> None:
        """Removes every value of ours from the storage; what host memory holds is then written again.

        Blocks the loop, so in a fleet it must take less than `agreement_timeout_s`, or the others give up.
        Raises RuntimeError if none is attached, StorageError if it cannot be emptied: what it holds is then written
        again all the same, so that all processes go on alike.
        """
        self._check_open()
        if self.storage is None:
            raise RefusedCall("no storage is attached")
        self.core.attachment.cleared()
        self.storage.clear()

    def set_policies(
        self, *, prefetch_policy: PrefetchPolicy | None = None, write_policy: WritePolicy | None = None
    ) -> None:
        """Other policies from now on; None leaves one as it is. Raises ValueError, and changes nothing, for one that
        cannot be: write_back can neither come nor go at run time. `config` says what holds."""
        self._check_open()
        self.core.attachment.change(prefetch_policy, write_policy)
        self.config = self.config.with_policies(prefetch_policy, write_policy)

    # ---- everything at once

    def reset(self) -> None:
        """Frees every tier's pages (storage keeps its own) and forgets what is in flight; usable afterwards."""
        self.core.reset()

    @changes
    def forget_device(self) -> None:
        """The device tier is empty from here on: its content is lost (a donated model step failed, an engine sleeps).

        Host memory and storage stay. Running leases end, as if released; admit their requests again. Nothing is
        allocated: go on with the pools that there are, or with those of `init_pools`.
        """
        self._check_open()
        self.core.forget_device()
        self.engine.forget_device()
        self._pools_check.forget()

    def snapshot(self, pools: DevicePools, directory: str | PathLike[str]) -> None:
        """Writes the tree and all pages of device and host memory to a folder, which must be empty; needs the extra
        `snapshot`. Raises RuntimeError unless `drain` came before and no request runs."""
        self._check_open()
        self._check_pools(pools)
        Snapshots(self.core, self._controller).write(pools, directory)

    def restore(self, directory: str | PathLike[str]) -> DevicePools:
        """Takes over what a snapshot holds, as far as it fits, into an empty cache of any sizes and mesh; returns pools
        to use instead of those of `init_pools`. The counter `restore_dropped_tokens` says what did not fit.

        Raises ValueError for pages of another kind, naming every difference, and for what is damaged or unfinished;
        RuntimeError unless the cache is empty, as it is after an error."""
        self._check_open()
        pools = Snapshots(self.core, self._controller).read(directory)
        self._pools_check.handed_back(pools)
        return pools

    def take_events(self) -> list[Event]:
        """What has come and gone on device and host since the last time, for a router that sends requests to prefixes.

        May be called from any thread: the page keys are computed here (1 us a page), not in the serving thread. Every
        process of a replica has the same events, so ask one. If nobody asks for long, what was missed is replaced by
        AllCleared and all that is there now. Raises RuntimeError unless the cache was made with `events=True`.
        """
        if self._events is None:
            raise RuntimeError("events are off: make the cache with CacheConfig(events=True)")
        return self._events.take()

    def stats(self) -> dict[str, Any]:
        """Counters from zero: hits by tier in tokens, pages by tier and component, transfers, drops with reasons;
        and bytes of a page, or state, over all ranks, without padding and repetition."""
        counters = self.core.counters
        taken = self._events.counts() if self._events is not None else {}
        return {
            "step": self.core.step_number,
            "requests": counters["admits"],
            "prompt_tokens": counters["prompt_tokens"],
            "hit_tokens": {tier.name.lower(): counters[f"{tier.name.lower()}_hit_tokens"] for tier in Tier},
            "pages": self.core.tiers.page_counts(),
            "page_bytes": {name: layout.page_bytes for name, layout in self.layouts.items()},
            "nodes": self.core.tiers.tree.num_nodes,
            "leases": len(self.core.leases),
            "retentions": len(self.core.retentions.live),
            "tenants": self.core.quotas.stats() if self.core.quotas is not None else {},
            "counters": dict(sorted({**counters, **taken}.items())),
            "transfers": self.engine.stats(),
        }

    def drain(self, pools: DevicePools, timeout_s: float = 300.0) -> DevicePools:
        """Steps until every transfer is over, so that all that can be stored is stored (for orderly ends and tests).

        Every process of a replica calls it in the same step. Raises TimeoutError in all of them, by the clock that they
        agree on, naming what is left, when a storage hangs for longer; the cache stays usable.
        """
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s >= 0:
            raise ValueError(f"timeout_s must be seconds, not {said(timeout_s)}")
        self._controller.is_draining = True
        try:
            return self._drain(pools, timeout_s)
        finally:
            self._controller.is_draining = False

    def _drain(self, pools: DevicePools, timeout_s: float) -> DevicePools:
        pools = self.apply(pools)
        first_step, start_ms = self.core.step_number, None
        while True:
            pools = self.apply(self.step(pools))
            core, agreed = self.core, self._controller.agreed
            if not (core.needs_exchange() or core.stores.is_waiting or core.admission.loading):
                return pools
            if agreed.step > first_step:
                start_ms = agreed.clock_ms if start_ms is None else start_ms
                if (agreed.clock_ms - start_ms) % CLOCK_MODULUS > timeout_s * 1000:
                    ids = core.live_transfers()
                    raise TimeoutError(f"storage transfers {ids} were still running after {timeout_s} s")
            self.engine.drain(DRAIN_SLICE_S)

    def close(self) -> None:
        """Stops the workers; what is stored stays stored. Afterwards whatever would move pages raises RuntimeError.

        Waits for calls of a storage under way (at the interpreter's end 5 s); a storage that hangs must be ended first.
        After an error that has ended serving they are left alone: they may wait for ever for what others owe.
        """
        if not self._closed:
            self._closed = True
            self._garbage.stop()
            self._controller.close()


def _check_storage(storage: Storage) -> None:
    if not isinstance(storage, Storage):
        raise RefusedType(f"storage must be a jaxcache Storage, not {type(storage).__name__}")


def one_device_mesh() -> Mesh:
    """A mesh of one device, for trying things out."""
    return jax.make_mesh((1, 1, 1), ("cp", "tp", "pp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
