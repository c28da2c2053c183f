"""What a tenant is sure of: room that is made for others does not take its full-attention pages below its floor."""

from __future__ import annotations

from tests.independent.content import demand
from tests.independent.world import Request, World


class Floors:
    """Counts what each tenant has in the tree, on the device, before and after a call that makes room."""

    def __init__(self, world: World):
        self.world = world
        components = world.first.components
        self._full = next(c for c, component in enumerate(components) if component.kind in ("prefix", "spine"))
        self.is_needed = bool(world.config.tenants)
        self._before: dict[str, int] = {}

    def before(self) -> None:
        if self.is_needed:
            self._before = self._count()

    def check(self, request: Request) -> None:
        """The call was made for this request, in whatever namespace."""
        if not self.is_needed:
            return
        served, after = self.world.tenant_of[request.text.namespace], self._count()
        for tenant, share in self.world.config.tenants.items():
            floor = int(share.floor * self.world.first.capacities[self._full] + 1e-9)
            least = min(self._before.get(tenant, 0), floor)
            demand(tenant == served or after.get(tenant, 0) >= least, "floors", tenant, self._before, after, floor)

    def _count(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for root, digest, is_live in self.world.first.roots():
            if not is_live:
                continue
            tenant = self.world.tenant_of[digest]
            nodes = list(root.children.values())
            while nodes:
                node = nodes.pop()
                nodes += node.children.values()
                page_ids = node.pages[self._full]
                counts[tenant] = counts.get(tenant, 0) + (0 if page_ids is None else len(page_ids))
        return counts
