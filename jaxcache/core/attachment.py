"""Whether there is a storage, and how it is used: both may change while transfers are in flight.

Every rank does the same in the same step; the digest notes it. Nothing here waits: a transfer under way ends when every
rank is quiet, as always, and what it says of a storage that is gone is not believed of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcache.core.bad_input import said
from jaxcache.core.decisions import checksum
from jaxcache.core.serving import RefusedCall, RefusedValue, changes
from jaxcache.types import PrefetchPolicy, WritePolicy

EXCHANGES_TO_KNOW = 2  # the first one read afterwards may have been issued before

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Attachment:
    """Part of PrefixCache."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.serving = core.serving

    @property
    def attached(self) -> bool:
        return self.core.stores.attached

    @property
    def is_readable(self) -> bool:
        """Whether storage may be asked: not while some rank may still have to empty it."""
        stores = self.core.stores
        return stores.attached and not stores.num_awaited_exchanges

    @changes
    def attach(self, kind: str = "") -> None:
        """From now on storage is asked, and host pages go there: what is in host memory already, too.

        kind: what storage it is, in a word; equal on all ranks
        Raises RuntimeError if one is attached, ValueError without host memory.
        """
        core = self.core
        if core.stores.attached:
            raise RefusedCall("a storage is attached: detach it first")
        if not core.tiers.has_host:
            raise RefusedValue("a storage needs a host tier to read into: set CacheConfig.host_pages")
        core.stores.attached = True
        core.stores.back_fill()
        core.planner.note("attach", checksum(kind.encode()))

    @changes
    def detach(self) -> None:
        """Nothing more is asked or stored. Prefetches that are not decided bring nothing; their requests go on.

        Raises RuntimeError if none is attached.
        """
        core = self.core
        if not core.stores.attached:
            raise RefusedCall("no storage is attached")
        core.stores.attached = False
        core.prefetches.abandon_all()
        core.stores.drop_waiting()
        core.stores.forget()
        core.planner.note("detach")

    @changes
    def cleared(self) -> None:
        """This rank's storage is about to be emptied: what host memory holds will be written again, once all ranks have
        said so; what one wrote before could be removed by another.

        Until then nothing is read, and prefetches that are not decided bring nothing, as with `detach`: what came of
        the old content would be in host memory and never in storage again.
        """
        stores = self.core.stores
        self.core.prefetches.abandon_all()
        stores.forget()
        stores.back_fill()
        stores.num_awaited_exchanges = EXCHANGES_TO_KNOW
        self.core.planner.note("cleared")

    @changes
    def change(self, prefetch_policy: PrefetchPolicy | None, write_policy: WritePolicy | None) -> None:
        """Other policies from now on. None: as before. Raises ValueError, and changes nothing, for one that cannot be.

        write_back keeps host pages that hang below device pages, so it can neither come nor go at run time.
        """
        core = self.core
        for policy, kind in ((prefetch_policy, PrefetchPolicy), (write_policy, WritePolicy)):
            if policy is not None and not isinstance(policy, kind):
                raise RefusedValue(f"a {kind.__name__} is needed, not {said(policy)}")
        back = WritePolicy.WRITE_BACK
        if write_policy is not None and write_policy is not core.backups.policy:
            if not core.tiers.has_host:
                raise RefusedValue(f"{write_policy} needs a host tier: set CacheConfig.host_pages")
            if back in (write_policy, core.backups.policy):
                raise RefusedValue(f"{back} can neither come nor go at run time; the policy is {core.backups.policy}")
            core.backups.use(write_policy)
        if prefetch_policy is not None:
            core.prefetches.policy = prefetch_policy
        codes = [list(type(policy)).index(policy) for policy in (core.prefetches.policy, core.backups.policy)]
        core.planner.note("policies", *codes)
