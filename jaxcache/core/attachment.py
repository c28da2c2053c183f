"""Whether there is a storage, and how it is used: both may change while transfers are in flight.

Every rank does the same in the same step; the digest notes it. Nothing here waits: a transfer under way ends when every
rank is quiet, as always, and what it says of a storage that is gone is not believed of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.types import PrefetchPolicy, WritePolicy

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Attachment:
    """Part of PrefixCache."""

    def __init__(self, core: PrefixCache):
        self.core = core

    @property
    def attached(self) -> bool:
        return self.core.stores.attached

    @property
    def is_busy(self) -> bool:
        """Whether a transfer still uses the storage that is, or was, attached."""
        return bool(self.core.live_transfers())

    def attach(self) -> None:
        """From now on storage is asked, and host pages go there: what is in host memory already, too, as far as the
        queue reaches. Raises RuntimeError if one is attached, ValueError without host memory."""
        core = self.core
        if core.stores.attached:
            raise RuntimeError("a storage is attached: detach it first")
        if not core.tiers.has_host:
            raise ValueError("a storage needs a host tier to read into: set CacheConfig.host_pages")
        core.stores.attached = True
        core.stores.back_fill()
        core.planner.note("attach", 16, 0)

    def detach(self) -> None:
        """Nothing more is asked or stored. Prefetches end with what they have brought; their requests go on.

        Raises RuntimeError if none is attached.
        """
        core = self.core
        if not core.stores.attached:
            raise RuntimeError("no storage is attached")
        core.stores.attached = False
        core.prefetches.abandon_all()
        core.counters["dropped_stores"] += len(core.stores.queue)
        core.stores.queue.clear()
        core.stores.forget()
        core.planner.note("detach", 17, 0)

    def cleared(self) -> None:
        """Storage was emptied: what it held will be written again when there is an occasion."""
        self.core.stores.forget()
        self.core.planner.note("cleared", 18, 0)

    def change(self, prefetch_policy: PrefetchPolicy | None, write_policy: WritePolicy | None) -> None:
        """Other policies from now on. None: as before. Raises ValueError, and changes nothing, for one that cannot be.

        write_back keeps host pages that hang below device pages, so it can neither come nor go at run time.
        """
        core = self.core
        for policy, kind in ((prefetch_policy, PrefetchPolicy), (write_policy, WritePolicy)):
            if policy is not None and not isinstance(policy, kind):
                raise ValueError(f"a {kind.__name__} is needed, not {policy!r}")
        back = WritePolicy.WRITE_BACK
        if write_policy is not None and write_policy is not core.backups.policy:
            if not core.tiers.has_host:
                raise ValueError(f"{write_policy} needs a host tier: set CacheConfig.host_pages")
            if back in (write_policy, core.backups.policy):
                raise ValueError(f"{back} can neither come nor go at run time; the policy is {core.backups.policy}")
            core.backups.use(write_policy)
        if prefetch_policy is not None:
            core.prefetches.policy = prefetch_policy
        codes = [list(type(policy)).index(policy) for policy in (core.prefetches.policy, core.backups.policy)]
        core.planner.note("policies", 19, *codes)
