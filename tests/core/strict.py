"""A scenario that also watches what each call does to the limits of tenants."""

from __future__ import annotations

from jaxcache.core.limits.tenants import Accounts
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.testing.request import Request
from jaxcache.testing.scenario import Scenario


class Strict(Scenario):
    """Full attention on the device, where limits are exact."""

    def admit(self, request: Request) -> bool:
        before = [resident(core) for core in self.cores]
        admitted = super().admit(request)
        for core, was in zip(self.cores, before, strict=True):
            check_floors(core, was, tenant(core, request))
            if admitted and request.tickets[0] is None:
                check_admission(core, tenant(core, request))
        return admitted

    def insert(self, request: Request) -> None:
        super().insert(request)
        for core in self.cores:
            check_quota(core, tenant(core, request))


def tenant(core: PrefixCache, request: Request) -> int:
    tenants = core.tiers.tenants
    namespace = request.sequences[0].namespace
    return 0 if tenants is None or namespace.retired else tenants.numbers.get(namespace.fields["tenant"], 0)


def accounts_of(core: PrefixCache) -> Accounts | None:
    tenants = core.tiers.tenants
    return None if tenants is None else tenants.accounts[0]


def resident(core: PrefixCache) -> list[int]:
    accounts = accounts_of(core)
    return [] if accounts is None else accounts.resident.copy()


def check_floors(core: PrefixCache, before: list[int], served: int) -> None:
    """Nobody else took a page of a floor."""
    accounts = accounts_of(core)
    if accounts is not None:
        for who, (was, now, floor) in enumerate(zip(before, accounts.resident, accounts.floors, strict=True)):
            assert who == served or now >= min(was, floor), f"E7: {who=} {was=} {now=} {floor=}"


def check_admission(core: PrefixCache, who: int) -> None:
    """Requests of one tenant together stay within its quota; one that is alone may not."""
    accounts, tenants = accounts_of(core), core.tiers.tenants
    if accounts is not None and tenants is not None and who:
        leases = [lease for lease in core.leases.values() if tenants.tenant_of[lease._node.account] == who]
        used = accounts.pinned[who] + accounts.owned[who]
        assert len(leases) == 1 or used <= accounts.quotas[who], f"E7: {who=} {used=} of {accounts.quotas[who]}"


def check_quota(core: PrefixCache, who: int) -> None:
    """After an insert nothing is above the quota that could leave."""
    accounts = accounts_of(core)
    if accounts is not None and who:
        surplus = accounts.resident[who] + accounts.owned[who] - accounts.quotas[who]
        assert surplus <= 0 or accounts.resident[who] == accounts.pinned[who], f"E7: {who=} {surplus=}"
