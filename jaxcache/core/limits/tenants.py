"""Tenants: how many pages each is sure of, and how many it may have at most, in every (component, tier).

    0 ------------ floor ---------------------------------- quota ------------------- pages of a tenant
    |  nobody else  |  what was used longest ago leaves, of   |   leaves before that
    |  takes these  |  tenants above their floors             |   of anybody else

A tenant is the value of the namespace field `tenant`; tenant 0 is everybody who has no limits. An account is what one
namespace of a tenant has (account 0: all of tenant 0), so that a retired namespace changes hands in O(1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import chain

from jaxcache.config import TenantShare, pages_of_share
from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node
from jaxcache.core.tokens import Namespace

RETIRED, OVER_QUOTA, ABOVE_FLOOR = 0, 1, 2  # in this order they leave


class Tenants:
    """Who is who. tenant_of, retired: by account, which is the `account` of every node of a namespace.

    changed:        accounts whose nodes or leases have changed, of which the orders have not been told yet
    perhaps_unused: retired accounts that have changed since they were last seen in use
    """

    def __init__(self, shares: Mapping[str, TenantShare]):
        self.names = ("", *sorted(shares))
        self.shares = (TenantShare(), *(shares[name] for name in self.names[1:]))
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.tenant_of = [0]
        self.retired = [False]
        self.roots: list[Node | None] = [None]
        self.changed: dict[int, None] = {}
        self.perhaps_unused: dict[int, None] = {}
        self.accounts: list[Accounts] = []

    def open(self, namespace: Namespace, root: Node) -> int:
        """The account of a new namespace: a retired one to which nothing can be charged any more, or one more."""
        tenant = self.numbers.get(namespace.fields.get("tenant", ""), 0)
        if not tenant:
            return 0
        account = self._unused()
        if account is None:
            account = len(self.tenant_of)
            self.tenant_of.append(0)
            self.retired.append(False)
            self.roots.append(None)
        self.roots[account] = root
        self.tenant_of[account], self.retired[account] = tenant, False
        for accounts in self.accounts:
            accounts.open(account, tenant)
        return account

    def _unused(self) -> int | None:
        """A retired account of which nothing is left, if there is one.

        What is charged is charged by a node: by its pages, or by a lease that ends there. So all is over when nothing
        hangs below the root, and nothing ends at it. A lease may have no page at all and still grow.
        """
        self.tell()
        while self.perhaps_unused:
            account, _ = self.perhaps_unused.popitem()
            root = self.roots[account]
            assert root is not None, f"I15: {account=} has no root"
            if not root.children and not root.ends_here:
                assert not any(
                    accounts.num_resident[account] + accounts.num_owned[account] for accounts in self.accounts
                )
                root.account = 0  # a request of the retired namespace may still come
                return account
        return None

    def queue_of(self, account: int) -> int:
        """Which accounts leave as readily: those of the same tenant, or (len(shares)) all that are retired."""
        return len(self.shares) if self.retired[account] else self.tenant_of[account]

    def tell(self) -> None:
        """Every order hears of the accounts that have changed: a use on the device counts in host memory too."""
        for account in self.changed:
            if self.retired[account]:
                self.perhaps_unused[account] = None
            for accounts in self.accounts:
                accounts.victims.changed(account)
        self.changed.clear()

    def retire(self, account: int) -> None:
        """What can never be found again is on nobody's account; it leaves first, and no floor protects it."""
        if account:
            for accounts in self.accounts:
                accounts.move(account, 0)
            self.tenant_of[account] = 0
            self.retired[account] = True
            self.changed[account] = None
            for accounts in self.accounts:
                accounts.victims.move(account, self.queue_of(account))


class Accounts(EvictionOrder):
    """The candidates of one (component, tier): one order of the configured policy for each account, and the sums.

    num_resident, num_pinned, num_owned: pages by account: of the tree, pinned ones of these, and what leases own
    resident, pinned, owned: the same by tenant; retained: pages that retentions keep; floors, quotas: in pages
    victims:  what each account would lose first
    """

    def __init__(self, context: OrderContext, make: type[EvictionOrder], tenants: Tenants):
        super().__init__(context)
        self.tenants = tenants
        self.make = make
        self.floors = [pages_of_share(share.floor, context.num_pages) for share in tenants.shares]
        self.quotas = [pages_of_share(share.quota, context.num_pages) for share in tenants.shares]
        self.resident = [0] * len(tenants.shares)
        self.pinned = self.resident.copy()
        self.owned = self.resident.copy()
        self.retained = self.resident.copy()
        self.orders: list[EvictionOrder] = []
        self.victims = Victims(len(tenants.shares) + 1, self.orders)
        self._moment = make.moment(context)
        self.num_resident: list[int] = []
        self.num_pinned: list[int] = []
        self.num_owned: list[int] = []
        self.open(0, 0)
        tenants.accounts.append(self)

    # ---- accounts

    def open(self, account: int, tenant: int) -> None:
        """A new account, or an empty one that is used again. Policies see its quota as the size of the cache."""
        order = self.make(self.context._replace(num_pages=self.quotas[tenant]))
        if account == len(self.orders):
            self.orders.append(order)
            for counts in (self.num_resident, self.num_pinned, self.num_owned):
                counts.append(0)
        else:
            self.orders[account] = order
        self.victims.open(account, tenant)

    def move(self, account: int, tenant: int) -> None:
        """An account goes to another tenant."""
        before = self.tenants.tenant_of[account]
        for sums, counts in (
            (self.resident, self.num_resident),
            (self.pinned, self.num_pinned),
            (self.owned, self.num_owned),
        ):
            sums[before] -= counts[account]
            sums[tenant] += counts[account]

    def note(self, account: int) -> None:
        """Something has happened, or is about to, to nodes or leases of an account."""
        self.tenants.changed[account] = None

    def count(self, account: int, resident: int, pinned: int) -> None:
        """So many pages more are there, and pinned."""
        self.note(account)
        tenant = self.tenants.tenant_of[account]
        self.num_resident[account] += resident
        self.num_pinned[account] += pinned
        self.resident[tenant] += resident
        self.pinned[tenant] += pinned

    def own(self, account: int, num_pages: int) -> None:
        """Leases own so many pages more."""
        self.note(account)
        self.num_owned[account] += num_pages
        self.owned[self.tenants.tenant_of[account]] += num_pages

    def excess(self, tenant: int, num_coming: int = 0) -> int:
        """Pages above the quota (negative: below), as it will be when so many more have come."""
        return self.resident[tenant] + self.owned[tenant] + num_coming - self.quotas[tenant]

    def retain(self, account: int, num_pages: int) -> None:
        """So many pages more are retained."""
        self.retained[self.tenants.tenant_of[account]] += num_pages

    def may_retain(self, account: int, num_pages: int) -> bool:
        """Whether it leaves a tenant within its quota, and every other one room for its floor."""
        tenant = self.tenants.tenant_of[account]
        if self.retained[tenant] + num_pages > self.quotas[tenant]:
            return False
        total = sum(self.retained) + num_pages
        beside = (total - kept + floor for kept, floor in zip(self.retained, self.floors, strict=True))
        return all(t == tenant or num <= self.context.num_pages for t, num in enumerate(beside))

    # ---- who leaves

    def promised(self, account: int) -> int:
        """Pages that would leave for an account's tenant: all its own that may, of others down to the floor."""
        served = self.tenants.tenant_of[account]
        num_pages = 0
        for tenant, (resident, pinned) in enumerate(zip(self.resident, self.pinned, strict=True)):
            num_pages += min(resident - pinned, self._above_floor(tenant, served))
        return num_pages

    def _above_floor(self, tenant: int, served: int) -> int:
        """How many pages a tenant may lose for the one that is served: with 10 resident pages and a floor of 8, for
        another tenant's sake, 2."""
        return self.resident[tenant] if tenant == served else max(0, self.resident[tenant] - self.floors[tenant])

    def victim(self, account: int, num_coming: int, own_only: bool) -> tuple[Node | None, int]:
        """What leaves next for an account's tenant, and how many of its pages may.

        Retired ones, then those over their quota, then what was used longest ago; in an account the policy says.

        num_coming: pages for which room is made; own_only: no other tenant has to give any
        """
        served = self.tenants.tenant_of[account]
        self.tenants.tell()
        moment = self.make.moment(self.context)
        if moment != self._moment:
            self._moment = moment
            self.victims.all_changed()
        best, best_key, best_cap = None, None, 0
        for queue in range(len(self.floors) + 1):
            is_retired = queue == len(self.floors)
            tenant = 0 if is_retired else queue
            if own_only and tenant != served:
                continue
            rank, cap = self._rank(tenant, served, num_coming) if not is_retired else (RETIRED, self.context.num_pages)
            victim = self.victims.first(queue) if cap else None
            if victim is not None:
                key = (rank, victim.last_used, victim.id)
                if best_key is None or key < best_key:
                    best, best_key, best_cap = victim, key, cap
        return best, best_cap

    def _rank(self, tenant: int, served: int, num_coming: int) -> tuple[int, int]:
        """How readily a tenant's pages leave, and how many may; (.., 0): none."""
        cap = self._above_floor(tenant, served)
        excess = self.excess(tenant, num_coming if tenant == served else 0)
        return (OVER_QUOTA, min(cap, excess)) if excess > 0 else (ABOVE_FLOOR, cap)

    def first(self) -> Node | None:
        return self.victim(0, 0, own_only=False)[0]

    # ---- an order among others

    def add(self, node: Node) -> None:
        self.orders[node.account].add(node)

    def add_as_next_victim(self, node: Node) -> None:
        self.orders[node.account].add_as_next_victim(node)

    def readmit(self, node: Node) -> None:
        self.orders[node.account].readmit(node)

    def discard(self, node: Node) -> None:
        self.orders[node.account].discard(node)

    def __iter__(self) -> Iterator[Node]:
        """One account after the other."""
        return chain.from_iterable(self.orders)

    def __contains__(self, node: Node) -> bool:
        return node in self.orders[node.account]

    def __len__(self) -> int:
        return sum(len(order) for order in self.orders)


Entry = tuple[int, int, int]  # last use of an account's victim, its node's id, the account


class Victims:
    """Of one (component, tier): what each account would lose first, so that choosing does not look at all of them.

    accounts of a queue: 7 --order--> node used at 31     heap of the queue: (12, id, 9), (31, id, 7), (40, id, 8)
                         8 --order--> node used at 40                         first --> the victim of account 9
                         9 --order--> node used at 12

    A queue is what leaves equally readily: one tenant's accounts, or all that are retired. An account is asked for its
    victim only after it has changed, so 4,000 idle accounts cost nothing. Invariant: the entry of an account that has
    not changed since it was asked is what its order would answer now.

    orders: by account, and the caller's to change
    """

    def __init__(self, num_queues: int, orders: list[EvictionOrder]):
        self._orders = orders
        self._queue_of: list[int] = []
        self._nodes: list[Node | None] = []
        self._entries: list[Entry | None] = []  # an entry of a heap that is not the same object here is out of date
        self._heaps: list[list[Entry]] = [[] for _ in range(num_queues)]
        self._changed: list[dict[int, None]] = [{} for _ in range(num_queues)]

    def open(self, account: int, queue: int) -> None:
        """An account without pages: the next one, or one that is used again."""
        if account == len(self._queue_of):
            self._queue_of.append(queue)
            self._nodes.append(None)
            self._entries.append(None)
        else:
            self.move(account, queue)

    def move(self, account: int, queue: int) -> None:
        self._changed[self._queue_of[account]].pop(account, None)
        self._queue_of[account] = queue
        self._nodes[account] = self._entries[account] = None
        self.changed(account)

    def changed(self, account: int) -> None:
        """Something has happened to a node of an account: its victim may be another one, or of another last use."""
        self._changed[self._queue_of[account]][account] = None

    def all_changed(self) -> None:
        for account in range(len(self._queue_of)):
            self.changed(account)

    def first(self, queue: int) -> Node | None:
        """The least recently used one of the victims of a queue's accounts."""
        heap, changed = self._heaps[queue], self._changed[queue]
        if changed:
            for account in changed:
                self._ask(account, heap)
            changed.clear()
        while heap:
            account = heap[0][2]
            if self._entries[account] is heap[0]:
                return self._nodes[account]
            heappop(heap)
        return None

    def _ask(self, account: int, heap: list[Entry]) -> None:
        node, before = self._orders[account].first(), self._entries[account]
        if node is None:
            self._nodes[account] = self._entries[account] = None
        elif before is None or before[1] != node.id or before[0] != node.last_used:
            self._nodes[account] = node
            self._entries[account] = entry = (node.last_used, node.id, account)
            heappush(heap, entry)
            if len(heap) > 2 * len(self._entries) + 64:
                heap[:] = [entry for entry in heap if self._entries[entry[2]] is entry]
                heapify(heap)
