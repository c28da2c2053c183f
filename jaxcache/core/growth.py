"""Room for the tokens that running requests are about to compute: one lease, or all that decode in a step.

|-- computed --|-- new --|-- rest of the page --|
0                       end                 quiet_end      up to there only numbers change: nearly always
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.core import bad_input
from jaxcache.core.lease import Lease, read_only
from jaxcache.core.serving import Refusal

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Growth:
    """Part of PrefixCache; changes the tables of leases by replacing them."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.tiers = core.tiers

    def grow(self, lease: Lease, num_computed: int, num_new_tokens: int) -> bool:
        """False: nothing has changed."""
        num_new_tokens = bad_input.count("num_new_tokens", num_new_tokens, 1)
        num_computed = self._checked(lease, num_computed)
        return self._grow(lease, num_computed, num_computed + num_new_tokens)

    def _checked(self, lease: Lease, num_computed: int) -> int:
        """num_computed as an int of Python, if the lease may report it."""
        if type(num_computed) is not int:
            num_computed = bad_input.count("num_computed", num_computed)
        bad_input.check_lease(self.core, lease, num_computed)
        if num_computed > lease.num_computed:
            bad_input.check_may_run(self.core, lease)
        return num_computed

    def _grow(self, lease: Lease, num_computed: int, end: int) -> bool:
        core, tiers = self.core, self.tiers
        if num_computed > lease._last_room:
            self.note_uncomputed(lease, num_computed)
        if end <= lease._quiet_end:  # numpy's integers decide as Python's do in PrefixCache.grow
            lease.num_computed = num_computed
            lease.num_tokens = max(lease.num_tokens, end)
            return True
        if core.backbone is not None:
            return core.backbone.grow(lease, num_computed, end)
        core.publishing.report(lease, num_computed)
        if core.quotas is not None:
            core.quotas.serve_lease(lease)
        wanted = -(-end // tiers.page_tokens)
        missing = [0 if table is None else wanted - len(table) for table in lease._tables]
        if max(missing) > 0:
            if any(n > device.available() for n, device in zip(missing, tiers.device, strict=True)):
                return False
            self._allocate(lease, missing)
            core.planner.note("grow", lease.id, num_computed, end - num_computed)
        lease.num_tokens = max(lease.num_tokens, end)
        lease._be_quiet(num_computed)
        if tiers.point is not None:
            core.admission.checkpoints(lease, num_computed, end)
        if core.quotas is not None:
            core.quotas.settle(lease)
        return True

    def note_uncomputed(self, lease: Lease, num_computed: int) -> None:
        """The loop says that so much is computed: what got room in this version of the pools can only be so in a later
        one, which has not come yet."""
        self.core.uncomputed = bad_input.Uncomputed(self.tiers.pools_version, lease.id, num_computed)

    def pools_have_come(self, version: int) -> None:
        """A model step has been dispatched since the version before: what has room now may be computed in it."""
        if version != self.tiers.pools_version:
            self.tiers.pools_version = version
            for lease in self.core.leases.values():
                lease._last_room = lease.num_tokens

    def _allocate(self, lease: Lease, missing: list[int]) -> None:
        """missing: pages by component, which are there or can be made free."""
        self.tiers.lease_id = lease.id
        for c, device in enumerate(self.tiers.device):
            table = lease._tables[c]
            if table is not None and missing[c] > 0:
                room = self.core.backups.make_room_on_device(c, missing[c])
                assert room, f"{device.component.name}: promised {missing[c]} pages"
                lease._tables[c] = read_only(np.concatenate([table, device.allocator.allocate(missing[c])]))

    def grow_all(self, leases: Sequence[Lease], num_computed: Sequence[int], num_new_tokens: int) -> int:
        """How many of the leases, from the first on, have room now. Where one is refused, nothing has changed."""
        tiers = self.tiers
        num_new_tokens = bad_input.count("num_new_tokens", num_new_tokens, 1)
        bad_input.check_lists(leases, num_computed)
        rest: list[int] | range = []
        uncomputed = self.core.uncomputed
        if set(map(type, leases)) == {Lease} and set(map(type, num_computed)) == {int}:
            before = [lease.num_computed for lease in leases], [lease.num_tokens for lease in leases]
            for i, lease in enumerate(leases):
                computed = num_computed[i]
                end = computed + num_new_tokens
                if (
                    end <= lease._quiet_end
                    and lease.num_computed <= computed <= lease.num_tokens
                    and lease._tiers is tiers
                ):  # as in PrefixCache.grow
                    if computed > lease._last_room:
                        self.note_uncomputed(lease, computed)
                    lease.num_computed = computed
                    if end > lease.num_tokens:
                        lease.num_tokens = end
                else:
                    rest.append(i)
        else:  # integers of numpy, or a mistake: one by one
            before = (), ()
            rest = range(len(leases))
        try:
            reported = [self._checked(leases[i], num_computed[i]) for i in rest]
        except Refusal:
            for lease, computed, num_tokens in zip(leases, *before, strict=False):
                lease.num_computed, lease.num_tokens = computed, num_tokens
            self.core.uncomputed = uncomputed
            raise
        if rest and self.core.backbone is not None:
            self.core.backbone.make_room_for(leases[rest[0]], len(rest))  # a page each, nearly always
        for i, computed in zip(rest, reported, strict=True):
            lease = leases[i]
            if not self._grow(lease, max(computed, lease.num_computed), computed + num_new_tokens):  # named twice
                return i
        return len(leases)
