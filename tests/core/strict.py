"""A scenario that also watches what each call does to the limits of tenants."""

from __future__ import annotations

from jaxcache.core.limits.tenants import Groups
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


def groups_of(core: PrefixCache) -> Groups | None:
    tenants = core.tiers.tenants
    return None if tenants is None else tenants.groups[0]


def resident(core: PrefixCache) -> list[int]:
    groups = groups_of(core)
    return [] if groups is None else groups.resident.copy()


def check_floors(core: PrefixCache, before: list[int], served: int) -> None:
    """Nobody else took a page of a floor."""
    groups = groups_of(core)
    if groups is not None:
        for who, (was, now, floor) in enumerate(zip(before, groups.resident, groups.floors, strict=True)):
            assert who == served or now >= min(was, floor), f"E7: {who=} {was=} {now=} {floor=}"


def check_admission(core: PrefixCache, who: int) -> None:
    """Requests of one tenant together stay within its quota; one that is alone may not."""
    groups, tenants = groups_of(core), core.tiers.tenants
    if groups is not None and tenants is not None and who:
        leases = [lease for lease in core.leases.values() if tenants.tenant_of[lease._node.group] == who]
        used = groups.pinned[who] + groups.owned[who]
        assert len(leases) == 1 or used <= groups.quotas[who], f"E7: {who=} {used=} of {groups.quotas[who]}"


def check_quota(core: PrefixCache, who: int) -> None:
    """After an insert nothing is above the quota that could leave."""
    groups = groups_of(core)
    if groups is not None and who:
        surplus = groups.resident[who] + groups.owned[who] - groups.quotas[who]
        assert surplus <= 0 or groups.resident[who] == groups.pinned[who], f"E7: {who=} {surplus=}"
