"""Whether there is a storage, and how it is used: both may change while transfers are in flight.

Every rank does the same in the same step; the digest notes it. Nothing here waits: a transfer under way ends when every
rank is quiet, as always, and what it says of a storage that is gone does not count for the next.
"""

from __future__ import annotations

from jaxcache.core.backups import Backups
from jaxcache.core.bad_input import said
from jaxcache.core.decisions import Decisions, checksum
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.serving import RefusedCall, RefusedValue, Serving, changes
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.types import PrefetchPolicy, WritePolicy

EXCHANGES_TO_KNOW = 2  # the first one read afterwards may have been issued before


class Attachment:
    """The storage of one cache, as far as the core is concerned."""

    def __init__(
        self,
        serving: Serving,
        tiers: Tiers,
        decisions: Decisions,
        stores: Stores,
        prefetches: Prefetches,
        backups: Backups,
    ):
        self.serving = serving
        self.tiers = tiers
        self.decisions = decisions
        self.stores = stores
        self.prefetches = prefetches
        self.backups = backups

    @property
    def attached(self) -> bool:
        return self.stores.attached

    @property
    def is_readable(self) -> bool:
        """Whether storage may be asked: not while some rank may still have to empty it."""
        stores = self.stores
        return stores.attached and not stores.num_awaited_exchanges

    @changes
    def attach(self, kind: str = "") -> None:
        """From now on storage is asked, and host pages go there: what is in host memory already, too.

        kind: what storage it is, in a word; equal on all ranks
        Raises RuntimeError if one is attached, ValueError without host memory.
        """
        if self.stores.attached:
            raise RefusedCall("a storage is attached: detach it first")
        if not self.tiers.has_host:
            raise RefusedValue("a storage needs a host tier to read into: set CacheConfig.host_pages")
        self.stores.attached = True
        self.stores.back_fill()
        self.decisions.note("attach", checksum(kind.encode()))

    @changes
    def detach(self) -> None:
        """Nothing more is asked or stored. Prefetches that are not decided bring nothing; their requests go on.

        Raises RuntimeError if none is attached.
        """
        if not self.stores.attached:
            raise RefusedCall("no storage is attached")
        self.stores.attached = False
        self.prefetches.abandon_all()
        self.stores.drop_waiting()
        self.stores.forget()
        self.decisions.note("detach")

    @changes
    def cleared(self) -> None:
        """This rank's storage is about to be emptied: what host memory holds will be written again, once all ranks have
        said so; what one wrote before could be removed by another.

        Until then nothing is read, and prefetches that are not decided bring nothing, as with `detach`: what came of
        the old content would be in host memory and never in storage again.
        """
        stores = self.stores
        self.prefetches.abandon_all()
        stores.forget()
        stores.back_fill()
        stores.num_awaited_exchanges = EXCHANGES_TO_KNOW
        self.decisions.note("cleared")

    @changes
    def change(self, prefetch_policy: PrefetchPolicy | None, write_policy: WritePolicy | None) -> None:
        """Other policies from now on. None: as before. Raises ValueError, and changes nothing, for one that cannot be.

        write_back keeps host pages that hang below device pages, so it can neither come nor go at run time.
        """
        for policy, kind in ((prefetch_policy, PrefetchPolicy), (write_policy, WritePolicy)):
            if policy is not None and not isinstance(policy, kind):
                raise RefusedValue(f"a {kind.__name__} is needed, not {said(policy)}")
        back = WritePolicy.WRITE_BACK
        if write_policy is not None and write_policy is not self.backups.policy:
            if not self.tiers.has_host:
                raise RefusedValue(f"{write_policy} needs a host tier: set CacheConfig.host_pages")
            if back in (write_policy, self.backups.policy):
                raise RefusedValue(f"{back} can neither come nor go at run time; the policy is {self.backups.policy}")
            self.backups.use(write_policy)
        if prefetch_policy is not None:
            self.prefetches.policy = prefetch_policy
        codes = [list(type(policy)).index(policy) for policy in (self.prefetches.policy, self.backups.policy)]
        self.decisions.note("policies", *codes)
