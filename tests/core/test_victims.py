"""Who leaves first among many namespaces: the same as a search over all of them finds, at the cost of a few."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxcache.config import TenantShare
from jaxcache.core import invariants
from jaxcache.core.eviction import POLICIES
from jaxcache.core.eviction.duel import SetDuel
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import OrderContext
from jaxcache.core.lease import Lease
from jaxcache.core.limits.tenants import ABOVE_FLOOR, OVER_QUOTA, RETIRED, Accounts, Victims
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Namespace
from jaxcache.types import Tier, WritePolicy
from tests.core.driver import drive
from tests.core.helpers import FULL, PAGE, make_core, prompt, state, window
from tests.core.serving import serve

MIXTURES = {
    "full": (FULL,),
    "full+window+state": (FULL, window(6), state(4)),
    "window": (window(6),),
    "window+state": (window(1), state(1)),
}
SHARES = {"a": TenantShare(floor=0.2, quota=0.6), "b": TenantShare(floor=0.1), "c": TenantShare(quota=0.3)}


# ---- the search over all accounts


class Room(NamedTuple):
    """What is asked of `Accounts.victim`."""

    account: int
    num_coming: int
    own_only: bool


def rank_of(accounts: Accounts, room: Room, account: int) -> int | None:
    tenant, served = accounts.tenants.tenant_of[account], accounts.tenants.tenant_of[room.account]
    if room.own_only and tenant != served:
        return None
    if accounts.tenants.retired[account]:
        return RETIRED
    if tenant != served and accounts.resident[tenant] <= accounts.floors[tenant]:
        return None
    coming = room.num_coming if tenant == served else 0
    used = accounts.resident[tenant] + accounts.owned[tenant] + coming
    return OVER_QUOTA if used > accounts.quotas[tenant] else ABOVE_FLOOR


def search(accounts: Accounts, room: Room) -> tuple[Node | None, dict[int, Node | None]]:
    """The first victim of all, and that of each account that may lose anything."""
    victims = {}
    for account in range(len(accounts.orders)):
        rank = rank_of(accounts, room, account)
        if rank is not None:
            victims[account] = accounts.orders[account].first()
    found = [(rank_of(accounts, room, a), v.last_used, v.id, v) for a, v in victims.items() if v is not None]
    return (min(found, key=lambda key: key[:3])[-1] if found else None), victims


def watch(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on every choice is compared with a search; returns how to ask how many there were."""
    victim_of, choices = Accounts.victim, count()

    def checked(accounts: Accounts, account: int, num_coming: int, own_only: bool) -> tuple[Node | None, int]:
        chosen, num_leaving = victim_of(accounts, account, num_coming, own_only)
        expected, victims = search(accounts, Room(account, num_coming, own_only))
        for account, victim in victims.items():
            entry = None if victim is None else (victim.last_used, victim.id, account)
            is_noted = any(account in changed for changed in accounts.victims._changed)
            assert is_noted or accounts.victims._entries[account] == entry, f"{account=} has changed, but was not noted"
        assert chosen is expected
        next(choices)
        return chosen, num_leaving

    patch.setattr(Accounts, "victim", checked)
    return lambda: next(choices)


def often_change_the_mind(patch: pytest.MonkeyPatch) -> None:
    """Adaptive goes back and forth between what it learned and lru."""
    calls = count()

    def use(duel: SetDuel, slots: np.ndarray, capacity: int) -> None:
        duel.learned_leads = next(calls) % 7 < 5

    patch.setattr(SetDuel, "use", use)


# ---- random operations on many namespaces


class Operations:
    """Serves, grows, aborts, retires: whatever a loop may do, on up to `MAX_SPACES` namespaces of four tenants."""

    MAX_SPACES = 14

    def __init__(self, core: PrefixCache, seed: int):
        self.core = core
        self.random = random.Random(seed)
        self.spaces: list[Namespace] = []
        self.leases: list[Lease] = []
        self.late: list[Any] = []  # sequences that wait, also when their namespace is retired
        self.num_namespaces = 0
        self.open()

    def run(self, num_operations: int) -> None:
        operations = (self.open, self.retire, *[self.admit] * 9, *[self.go_on] * 6, *[self.end] * 7, self.step)
        for i in range(num_operations):
            self.random.choice(operations)()
            if i % 40 == 0:
                invariants.check(self.core)
        while self.leases:
            self.end()
        for _ in range(2):
            self.step()
        invariants.check(self.core)
        invariants.check_empty(self.core)

    def step(self) -> None:
        self.core.take_plan()
        self.core.commit({})

    def open(self) -> None:
        if len(self.spaces) < self.MAX_SPACES:
            self.num_namespaces += 1
            tenant, salt = self.random.choice("abcd"), str(self.num_namespaces)
            self.spaces.append(self.core.new_namespace(model="test", tenant=tenant, tenant_salt=salt))

    def retire(self) -> None:
        if len(self.spaces) > 1:
            self.core.retire_namespace(self.spaces.pop(self.random.randrange(len(self.spaces))))

    def admit(self) -> None:
        """A prompt that shares some pages with others of its namespace."""
        rng = self.random
        if self.late and rng.random() < 0.1:
            sequence = self.late.pop()
        else:
            family, branch = rng.randrange(2), rng.randrange(3)
            tokens = [
                *prompt(rng.choice([4, 9, 16]), 1000 * family),
                *prompt(rng.randint(1, 16), 10_000 + 1000 * branch),
            ]
            sequence = self.core.sequence(tokens, rng.choice(self.spaces))
        if rng.random() < 0.1:
            self.late.append(sequence)
            return
        lease = self.core.admit(sequence, rng.choice([PAGE, *[sequence.num_tokens] * 3]))
        if isinstance(lease, Lease):
            self.leases.append(lease)
            self.is_noted(lease)  # the profile of reuse has changed after the last page moved
        elif self.leases:
            self.end()

    def go_on(self) -> None:
        """A chunk is computed; then perhaps inserted; then there is room for more, or the request ends."""
        if not self.leases:
            return
        rng, core = self.random, self.core
        self.step()
        lease = rng.choice(self.leases)
        end = lease.num_tokens if lease.next_stop is None else min(lease.num_tokens, lease.next_stop)
        missing = end - lease.sequence.num_tokens
        if missing > 0:
            lease.sequence.extend([rng.randrange(2) for _ in range(missing)])
        if rng.random() < 0.7:
            options = (
                {"priority": rng.randrange(3), "retain_steps": rng.choice([0, 0, 3])} if rng.random() < 0.3 else {}
            )
            states = [position for position in lease.checkpoints if position <= end]
            core.insert(lease, end, states=states, **options)
        if not core.grow(lease, end, rng.choice([1, PAGE])):
            self.end(lease)

    def end(self, lease: Lease | None = None) -> None:
        if self.leases:
            lease = lease or self.random.choice(self.leases)
            self.leases.remove(lease)
            if lease.sequence.num_tokens >= lease.num_computed and self.random.random() < 0.5:
                self.core.insert(lease, lease.num_computed)
            self.core.release(lease)
            self.is_noted(lease)

    def is_noted(self, lease: Lease) -> None:
        assert self.core.tiers.tenants is not None
        assert lease._node.account in self.core.tiers.tenants.changed


def random_core(seed: int, policy: str, mixture: str) -> PrefixCache:
    rng = random.Random(seed)
    return make_core(
        *MIXTURES[mixture],
        eviction_policy=policy,
        tenants=SHARES,
        device_pages=rng.choice([12, 20, 30]),
        host_pages=rng.choice([0, 8, 20, 60]),
        write_policy=rng.choice(list(WritePolicy)),
        evict_output_first=rng.random() < 0.5,
        max_retained_share=0.4,
        max_states_per_path=rng.choice([1, 3]),
    )


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_victim_is_the_one_that_a_search_finds(policy, mixture, seed, monkeypatch):
    """E7: whatever happens to 14 namespaces of four tenants, on every tier."""
    if policy == "adaptive":
        often_change_the_mind(monkeypatch)
    num_choices = watch(monkeypatch)
    for i in range(4):
        Operations(random_core(1000 * seed + i, policy, mixture), 1000 * seed + i).run(400)
    assert num_choices() > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_the_victim_of_a_serving_loop_is_the_one_that_a_search_finds(policy, seed, monkeypatch):
    """With storage, load-backs, resets and lost devices as well."""
    num_choices = watch(monkeypatch)
    for i in range(2):
        drive(1000 * seed + 40 + i, 80, 1, eviction_policy=policy, tenants=SHARES, device_pages=40)
    assert num_choices() > 10


# ---- what the search relies on


def change(tiers: Tiers, residency: Residency, node: Node, call: str) -> None:
    core_pages = np.arange(2, dtype=np.int32)
    assert tiers.tenants is not None
    if call in ("put", "publish"):
        residency.take(node)
        tiers.tenants.changed.clear()
        getattr(residency, call)(node, core_pages)
    elif call == "unpin_up":
        residency.pin_up(node)
        tiers.tenants.changed.clear()
        residency.unpin_up(node)
    elif call == "shorten":
        residency.shorten(node, 1)
    elif call == "split":
        tiers.split(node, PAGE)
    else:
        getattr(residency, call)(node)


@pytest.mark.parametrize(
    "call",
    ["put", "publish", "take", "shorten", "split", "pin", "pin_up", "unpin_up", "touch", "demote", "reorder"],
)
@pytest.mark.parametrize("mixture", [(FULL,), (window(100),)], ids=["full", "window"])
def test_every_call_of_a_residency_notes_the_account(call, mixture):
    """On both tiers, since a use on the device moves what is in host memory."""
    core = make_core(*mixture, tenants=SHARES, host_pages=8)
    a = core.new_namespace(model="test", tenant="a")
    serve(core, prompt(2 * PAGE), a)
    residency = core.tiers.device[-1]
    assert core.tiers.tenants is not None
    (node,) = invariants.all_nodes(core)
    core.tiers.tenants.changed.clear()
    change(core.tiers, residency, node, call)
    assert list(core.tiers.tenants.changed) == [node.account]


def test_out_of_date_entries_do_not_pile_up():
    """An account that is used all the time, while the victim of another one stays first, keeps the heap small."""
    orders: list[Any] = [Lru(OrderContext(0, 8, Tier.DEVICE, False, None)) for _ in range(4)]
    victims = Victims(1, orders)
    for account in range(4):
        victims.open(account, 0)
    nodes = [Node(i, None, b"", b"", 0, 1) for i in range(8)]
    for i, node in enumerate(nodes):
        node.account, node.last_used = i % 4, i - 8
        orders[node.account].add(node)
    victims.all_changed()
    for now in range(1000):
        node = nodes[(1, 5)[now % 2]]
        node.last_used = now
        orders[node.account].discard(node)
        orders[node.account].add(node)
        victims.changed(node.account)
        first = victims.first(0)
        assert first is min((order.first() for order in orders), key=lambda n: (n.last_used, n.id))
    assert len(victims._heaps[0]) <= 2 * 4 + 64


# ---- what it costs


def num_instructions(call: Callable[[], Any]) -> int:
    """Bytecodes that a call executes: a loop over all namespaces shows, also if it calls nothing."""
    executed = 0

    def trace(frame, event, argument):
        nonlocal executed
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return executed


def costs(num_namespaces: int, num_retired: int, policy: str) -> dict[str, int]:
    """Of what a request of b does, beside so many namespaces of a with a page each, which leave first."""
    shares = {"a": TenantShare(), "b": TenantShare()}
    core = make_core(device_pages=num_namespaces + 8, tenants=shares, eviction_policy=policy)
    spaces = [core.new_namespace(model="test", tenant="a", tenant_salt=str(i)) for i in range(num_namespaces)]
    for space in spaces:
        serve(core, prompt(PAGE), space)
    for space in spaces[:num_retired]:
        core.retire_namespace(space)
    b = core.new_namespace(model="test", tenant="b")
    for i in range(6):  # the first four fill the device
        serve(core, prompt(2 * PAGE, 1000 * i), b)
    sequence = core.sequence(prompt(2 * PAGE, 9000), b)
    leases: list[Any] = []
    evicted = core.tiers.num_evicted_pages[0]
    operations = {
        "admit": lambda: leases.append(core.admit(sequence, 2 * PAGE)),
        "insert": lambda: core.insert(leases[0], 2 * PAGE),
        "grow": lambda: core.grow(leases[0], 2 * PAGE, 1),
        "release": lambda: core.release(leases[0]),
        "retire": lambda: core.retire_namespace(spaces[-1]),
        "open": lambda: core.new_namespace(model="test", tenant="a", tenant_salt="new"),
    }
    counts = {name: num_instructions(operation) for name, operation in operations.items()}
    assert core.tiers.num_evicted_pages[0] == evicted + 3
    return counts


@pytest.mark.parametrize("retired_share", [0, 0.5])
@pytest.mark.parametrize("policy", ["lru", "s3fifo", "adaptive"])
def test_namespaces_of_one_tenant_do_not_slow_another(policy, retired_share):
    """E6, E7: no operation looks at all of them, nor at all that are retired."""
    num_instructions(make_core)  # the first one of an interpreter counts nothing
    few, many = (costs(n, int(n * retired_share), policy) for n in (40, 800))
    assert all(few.values())
    assert {name: many[name] / few[name] for name in few if many[name] > 1.1 * few[name]} == {}
